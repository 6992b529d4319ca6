"""What a person types: short forms, configuration files, unknown keys; all without importing torch or Lightning."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litft.cli import keys
from litft.cli.arguments import expand, find_config, hub_names, read_config
from litft.cli.readable import readable
from litft.errors import UserError


def values(argv: list[str], tuner: str | None = "lora") -> dict[str, str]:
    return dict(word[2:].partition("=")[::2] for word in expand(argv, tuner))


def refused(argv: list[str], tuner: str | None = "lora") -> str:
    with pytest.raises(UserError) as error:
        expand(argv, tuner)
    text = str(error.value)
    assert 1 <= len(text.splitlines()) <= 5
    return text


# ---- flags


def test_short_forms() -> None:
    found = values(["--data", "a.jsonl", "b.jsonl", "--model", "org/name", "--out=x"])
    assert json.loads(found["data.train"]) == ["a.jsonl", "b.jsonl"]
    assert (found["model.path"], found["out"], found["model.tuner"]) == ("org/name", "x", "litft.LoRA")


def test_long_forms_are_the_same_keys() -> None:
    assert expand(["--data.train", "a.jsonl"], "lora") == expand(["--data=a.jsonl"], "lora")
    assert expand(["--model.path", "m"], "full") == expand(["--model", "m"], "full")


def test_one_value_of_a_list_is_a_list() -> None:
    assert json.loads(values(["--data", "a.jsonl"])["data.train"]) == ["a.jsonl"]
    assert json.loads(values(["--data.weights", "2", "0.5"])["data.weights"]) == [2.0, 0.5]
    assert json.loads(values(["--data.weights", "2"])["data.weights"]) == [2.0]
    assert values(["--data.weights=[1, 2]"])["data.weights"] == "[1, 2]"
    assert json.loads(values(["--data.val", "a.jsonl", "b.jsonl"])["data.val"]) == ["a.jsonl", "b.jsonl"]


def test_several_values_after_one_flag() -> None:
    found = values(["--model.tuner.targets", "q_proj", "v_proj", "--model.tuner.modules_to_save", "lm_head"])
    assert json.loads(found["model.tuner.targets"]) == ["q_proj", "v_proj"]
    assert json.loads(found["model.tuner.modules_to_save"]) == ["lm_head"]
    assert values(["--model.tuner.targets", "all-linear"])["model.tuner.targets"] == "all-linear"
    assert json.loads(values(["--model.tuner.target_parameters", "x"])["model.tuner.target_parameters"]) == ["x"]
    assert values(["--model.tuner.modules_to_save", "null"])["model.tuner.modules_to_save"] == "null"
    assert json.loads(values(["--model.betas", "0.9", "0.95"])["model.betas"]) == [0.9, 0.95]


def test_the_tuner_comes_before_its_options() -> None:
    words = expand(["--model.tuner.r", "8", "--data", "a"], "qlora")
    assert words[0] == "--model.tuner=litft.QLoRA" and "--model.tuner.r=8" in words


def test_a_negative_number_is_a_value() -> None:
    assert values(["--trainer.max_steps", "-1"])["trainer.max_steps"] == "-1"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["chats.jsonl"], "--data chats.jsonl"),
        (["--model", "a", "b"], "--model.path takes one value"),
        (["--data", "a", "--data", "b"], "--data.train is said twice; several values follow one flag"),
        (["--model", "a", "--model.path", "b"], "--model.path is said twice"),
        (["--out"], "--out needs a value"),
        (["--resume", "yes"], "--resume takes no value"),
        (["--data.weights", "a", "b"], "not numbers"),
    ],
)
def test_stray_words_are_refused(argv: list[str], says: str) -> None:
    assert says in refused(argv)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trainer.max_step", "trainer.max_steps"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("lr", "model.lr"),
        ("max_steps", "trainer.max_steps"),
        ("model.tuner.rank", "model.tuner.r"),
        ("tuner.alpha", "model.tuner.alpha"),
        ("data.packng", "data.packing"),
        ("checkpoint.every_n_steps", "checkpoint.every_steps"),
        ("modl.lr", "model.lr"),
        ("outt", "out"),
        ("data.tokens_per_bach", "data.tokens_per_batch"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, meant: str) -> None:
    text = refused([f"--{typed}", "1"])
    assert f"unknown key --{typed}; did you mean --{meant}?" in text


@pytest.mark.parametrize("short", ["trainer.max_st", "mod.lr", "dat", "res", "dry", "seed"])
def test_abbreviations_are_refused(short: str) -> None:
    assert f"unknown key --{short}" in refused([f"--{short}", "1"])


def test_another_tuners_option_is_unknown() -> None:
    assert "unknown key --model.tuner.quant" in refused(["--model.tuner.quant", "nf4"], "lora")
    assert "unknown key --model.tuner.r" in refused(["--model.tuner.r", "8"], "full")
    assert values(["--model.tuner.quant", "int8"], "qlora")["model.tuner.quant"] == "int8"


def test_keys_of_loggers_and_val_sets_are_left_to_their_classes() -> None:
    found = values(["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "logs"])
    assert found["trainer.logger.save_dir"] == "logs"


@given(st.sampled_from(sorted(keys.known("qlora")[0])), st.integers(0, 60), st.characters(categories=["Ll"]))
def test_one_wrong_letter_in_any_key_gets_a_hint(key: str, position: int, letter: str) -> None:
    valid = keys.known("qlora")[0]
    typed = key[: position % len(key)] + letter + key[position % len(key) + 1 :]
    if typed not in valid and len(key) > 4:
        assert keys.nearest(typed, valid)


# ---- the keys themselves


@pytest.mark.parametrize("method", keys.METHODS)
def test_keys_are_those_of_the_classes(method: str) -> None:
    """Read from source; here held against what Python itself says of the imported classes."""
    from lightning import Trainer

    import litft
    from litft.engine.samples import Samples

    def of(cls: type) -> set[str]:
        found: set[str] = set()
        for owner in cls.__mro__:  # up to the one that hands nothing on
            taken = inspect.signature(owner.__init__).parameters.items() if "__init__" in vars(owner) else ()
            found |= {n for n, p in taken if n != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if "__init__" in vars(owner) and not any(p.kind is p.VAR_KEYWORD for _, p in taken):
                return found
        return found

    command = keys.METHODS[method]
    own = {name: getattr(litft, path.partition(".")[2]) for name, path in vars(command).items() if name != "places"}
    classes = {"model": own["method"], "data": own["data"], "checkpoint": litft.Checkpoints, "samples": Samples}
    for group, cls in {**classes, "trainer": Trainer}.items():
        found = {k.removeprefix(f"{group}.") for k in keys.known("lora", method)[0] if k.startswith(f"{group}.")}
        assert {k for k in found if "." not in k} == of(cls), group
    for tuner, options in {"full": set(), "lora": of(litft.LoRA), "qlora": of(litft.LoRA) | {"quant"}}.items():
        known = keys.known(tuner)[0]
        assert {k.removeprefix("model.tuner.") for k in known if k.startswith("model.tuner.")} == options


@pytest.mark.parametrize("method", keys.METHODS)
def test_keys_are_those_of_the_parser(method: str) -> None:
    from litft.cli.finetune import _parse, _quiet

    _quiet()
    teacher = ["--model.teacher", "x"] if method == "distill" else []
    parser = _parse(expand(["--data", "x.jsonl", *teacher], method), method).parser
    whole = {key for key, _ in parser.get_defaults(skip_validation=True).items()}
    known = keys.known("lora", method)[0] | {"print_config"}
    assert {k for k in whole if not k.startswith("model.tuner")} <= known
    groups = {"model", "data", "checkpoint", "samples", "trainer", "print_config", "help"}
    assert {k for k in known - groups if not k.startswith("model.tuner")} <= whole | {"config"}


def test_a_wrong_flag_is_answered_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, litft.cli.main as m; rc = m.main(['finetune', 'lora', '--trainer.max_step', '8']); "
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules); "
        "assert rc == 2 and not heavy, (rc, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "did you mean --trainer.max_steps?" in done.stderr


def test_help_is_answered_without_torch() -> None:
    code = (
        "import sys, litft.cli.main as m; rc = m.main(['--help']); "
        "assert rc == 0 and not {'torch', 'lightning', 'transformers', 'yaml'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "litft finetune full|lora|qlora" in done.stdout


# ---- configuration files


def config(tmp_path: Path, text: str, name: str = "c.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_files_and_short_forms_in_yaml(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        "model: {tuner: lora, path: m, betas: [0.9, 0.95]}\ndata:\n  train: a.jsonl\n  weights: [2.0]\n"
        "trainer:\n  max_steps: 4\n  logger: null\n",
    )
    found = values(["--config", path])
    assert found["model.tuner"] == "litft.LoRA" and found["model.path"] == "m"
    assert json.loads(found["data.train"]) == ["a.jsonl"] and json.loads(found["model.betas"]) == [0.9, 0.95]
    assert found["trainer.max_steps"] == "4" and found["trainer.logger"] == "null"
    short = config(tmp_path, "data: a.jsonl\nmodel: m\nout: x\n", "short.yaml")
    assert values(["--config", short])["data.train"] == '["a.jsonl"]'
    assert values(["--config", short])["model.path"] == "m"


def test_flags_go_before_files_and_later_files_before_earlier(tmp_path: Path) -> None:
    one = config(tmp_path, "model: {lr: 1.0e-3, clip: 2.0}\n", "one.yaml")
    two = config(tmp_path, "model: {lr: 2.0e-3}\n", "two.yaml")
    assert values(["--model.lr", "5e-3", "--config", one])["model.lr"] == "5e-3"
    found = values(["--config", one, "--config", two])
    assert float(found["model.lr"]) == 2e-3 and float(found["model.clip"]) == 2.0


def test_a_flag_replaces_all_that_a_file_says_below_it(tmp_path: Path) -> None:
    path = config(tmp_path, "trainer:\n  callbacks:\n    - class_path: not.There\n  logger: {class_path: x.Y}\n")
    words = expand(["--config", path, "--trainer.callbacks", "null", "--trainer.logger", "Z"], "lora")
    assert words[1:] == ["--trainer.callbacks=null", "--trainer.logger=Z"]


def test_val_sets_by_name(tmp_path: Path) -> None:
    path = config(tmp_path, "data:\n  train: [a.jsonl, b.jsonl]\n  val: {maths: m.jsonl, chat: c.jsonl}\n")
    assert json.loads(values(["--config", path])["data.val"]) == {"maths": "m.jsonl", "chat": "c.jsonl"}


def test_a_saved_tuner_is_read_back(tmp_path: Path) -> None:
    path = config(tmp_path, "model:\n  tuner:\n    class_path: litft.QLoRA\n    init_args: {r: 8, quant: int8}\n")
    found = values(["--config", path], None)
    assert (found["model.tuner"], found["model.tuner.r"], found["model.tuner.quant"]) == ("litft.QLoRA", "8", "int8")


def test_a_tuner_that_contradicts_the_command(tmp_path: Path) -> None:
    path = config(tmp_path, "\nmodel: {tuner: qlora}\n")
    assert f"{path}:2: tuner qlora, but the command says lora" in refused(["--config", path])
    assert "no tuner 'lorra'" in refused(["--model.tuner", "lorra"]) and "mean lora?" in refused(
        ["--model.tuner", "lorra"]
    )


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("trainer:\n  max_step: 3\n", 2, "--trainer.max_step; did you mean --trainer.max_steps?"),
        ("data:\n  train: x\n  packin: true\n", 3, "did you mean --data.packing?"),
        ("model:\n  tuner:\n    class_path: litft.LoRA\n    init_args:\n      rank: 3\n", 5, "--model.tuner.r?"),
        ("model:\n  tuner: {alfa: 3}\n", 2, "did you mean --model.tuner.alpha?"),
        ("modl:\n  lr: 3\n", 2, "did you mean --model.lr?"),
        ("checkpoint:\n  deep:\n    er: 1\n", 3, "unknown key --checkpoint.deep.er"),
    ],
)
def test_an_unknown_yaml_key_names_file_and_line(text: str, line: int, says: str, tmp_path: Path) -> None:
    path = config(tmp_path, text)
    found = refused(["--config", path])
    assert found.startswith(f"{path}:{line}: unknown key") and says in found


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [1\n", "not YAML"), ("- 1\n- 2\n", "not keys and values"), ("just text\n", "not keys and values")],
)
def test_broken_yaml(text: str, says: str, tmp_path: Path) -> None:
    path = config(tmp_path, text)
    found = refused(["--config", path])
    assert path in found and says in found


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, "# nothing\n")) == []


def test_hub_names_and_the_nearest() -> None:
    names = hub_names()
    assert {"smollm2/135m-lora", "qwen3/0.6b-qlora", "llama3/8b-lora"} <= set(names)
    assert find_config("smollm2/135m-lora").is_file() and find_config("smollm2/135m-lora.yaml").is_file()
    assert "did you mean smollm2/135m-lora?" in refused(["--config", "smollm2/135-lora"])
    assert "no such file" in refused(["--config", "/nowhere/x.yaml"])


def test_resume_reads_the_runs_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    config(tmp_path / "out", "model: {path: saved, lr: 1.0e-3}\n", "config.yaml")
    own = values(["--out", str(tmp_path / "out"), "--resume", "--model.lr", "2e-3"])
    assert (own["model.path"], own["model.lr"]) == ("saved", "2e-3")
    assert values([f"--out={tmp_path / 'out'}", "--resume"])["model.path"] == "saved"
    other = config(tmp_path, "model: {path: other}\n")
    assert values(["--out", str(tmp_path / "out"), "--resume", "--config", other])["model.path"] == "other"
    assert "model.path" not in values(["--out", str(tmp_path / "out")])


# ---- the parser's messages

UNION = """Parser key "patience":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: x"""


def test_readable_messages() -> None:
    assert readable(UNION) == "--patience x: must be a whole number or null"
    literal = "Parser key \"model.schedule\":\n  Expected a typing.Literal['cosine', 'wsd']. Got value: cosin"
    assert readable(literal) == "--model.schedule cosin: must be cosine or wsd; did you mean cosine?"
    assert readable("something else\n  entirely") == "something else\nentirely"
