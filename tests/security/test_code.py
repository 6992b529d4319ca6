"""What code may run: a model's own only when the user says so now, classes only of the kind that is asked for, and
nothing from the current folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

TRUST = ["--model.trust_remote_code", "true"]

# ---- a model's own code

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def own_model(model: Path, canary: Any) -> None:
    (model / "modeling_own.py").write_text(canary.code + OWN)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(model / "config.json", auto_map=auto_map, model_type="own", architectures=["OwnForCausalLM"])


def own_model_that_says_trust(model: Path, canary: Any) -> None:
    own_model(model, canary)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        change(model / name, trust_remote_code=True)
    (model / "config.yaml").write_text("model:\n  trust_remote_code: true\n")


def own_tokenizer(model: Path, canary: Any) -> None:
    (model / "tokenization_own.py").write_text(canary.code + OWN_TOKENIZER)
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer", trust_remote_code=True)


@pytest.mark.parametrize(
    ("verb", "own"),
    [
        ("finetune", own_model),
        ("finetune", own_model_that_says_trust),
        ("finetune", own_tokenizer),
        ("generate", own_model_that_says_trust),
        ("generate", own_tokenizer),
        ("chat", own_model),
    ],
)
def test_a_models_own_code(verb: str, own: Any, model: Path, canary: Any, litft: Any) -> None:
    own(model, canary)
    code, said = litft(verb, model)
    assert code == 2 and "its own Python code" in said and "--model.trust_remote_code true" in said, said
    canary.would(lambda: litft(verb, model, *TRUST))


@pytest.mark.parametrize("verb", ["finetune", "generate"])
def test_code_that_nobody_needs_is_left_alone(verb: str, model: Path, canary: Any, litft: Any) -> None:
    """A known model type whose folder names code too, as many on the hub do."""
    (model / "modeling_own.py").write_text(canary.code + OWN)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(model / "config.json", auto_map=auto_map)
    own_tokenizer(model, canary)
    change(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(canary.code + "def generate(*_, **__): return None\n")
    code, said = litft(verb, model)
    assert code == 0, said
    canary.would(lambda: litft(verb, model, *TRUST))


@pytest.mark.parametrize("verb", ["finetune", "generate"])
def test_an_adapter_on_a_model_with_its_own_code(
    verb: str, model: Path, canary: Any, litft: Any, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    code, said = litft("finetune", model, "--out", "run", "--trainer.max_steps", 1)
    assert code == 0, said
    shutil.copytree("run/final", adapter)
    change(adapter / "adapter_config.json", trust_remote_code=True, auto_mapping={"parent_library": "modeling_own"})
    own_model(model, canary)
    code, said = litft(verb, adapter)
    assert code == 2 and "its own Python code" in said, said
    canary.would(lambda: litft(verb, adapter, *TRUST))


def test_a_runs_configuration_does_not_switch_it_on(model: Path, canary: Any, litft: Any) -> None:
    """Not where the folder of a run is named; only where somebody names that very file."""
    code, said = litft("finetune", model, "--out", "run", "--trainer.max_steps", 1)
    assert code == 0, said
    own_model(model, canary)
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    saved["model"]["trust_remote_code"] = True
    Path("run/config.yaml").write_text(yaml.safe_dump(saved))
    for words in ([None, "--out", "run", "--resume"], ["run"]):
        code, said = litft("finetune", *words)
        assert code == 2 and "--model.trust_remote_code true" in said, said
    assert "run/config.yaml:" in litft("finetune", None, "--out", "run", "--resume")[1]
    assert litft("generate", "run")[0] == 2
    canary.would(lambda: litft("finetune", None, "--config", "run/config.yaml"))
    assert "not taken over" not in litft("finetune", None, "--out", "run", "--resume", *TRUST)[1]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_from_the_hub_that_a_configuration_asks_for(key: str, model: Path, litft: Any) -> None:
    change(model / "config.json", **{key: "somebody/kernel"})
    asked = AutoConfig.from_pretrained(model)  # transformers would fetch and import it, where `kernels` is installed
    assert "somebody/kernel" in (asked._attn_implementation, asked._experts_implementation)
    for verb in ("finetune", "generate"):
        code, said = litft(verb, model)
        assert code == 2 and "asks for code from the hub (somebody/kernel)" in said, said


# ---- classes by name

BYSTANDER = """
from lightning import Callback
{touch}
class Wrong:
    def __init__(self, *_, **__):
        touch()
    def __call__(self, *_, **__):
        touch()

def function(*_, **__):
    touch()

class Good(Callback):
    def __init__(self, word: str = ""):
        print("GOOD", word)
"""
KEYS = ("trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.strategy", "trainer.profiler")
KEYS += ("trainer.accelerator", "model.tuner", "model.optimizer")
WRONG = ("bystander.Wrong", "bystander.function", "os.system", "subprocess.Popen", "builtins.eval")


@pytest.fixture
def bystander(canary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that is installed, with classes of another kind."""
    sys.modules.pop("bystander", None)
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "bystander.py").write_text(BYSTANDER.format(touch=f"def touch():\n    {canary.code}"))
    monkeypatch.syspath_prepend(str(folder))
    import bystander

    return bystander


@pytest.mark.parametrize("key", KEYS)
def test_classes_of_another_kind(key: str, model: Path, canary: Any, bystander: Any, litft: Any) -> None:
    wrong, popen = {"class_path": "bystander.Wrong"}, {"class_path": "subprocess.Popen"}
    popen |= {"init_args": {"args": ["touch", str(canary.file)]}}
    spelt = [] if key.startswith("model.") else [json.dumps(value) for value in (wrong, [wrong], popen)]
    for value in (*WRONG, *spelt):
        code, said = litft("finetune", model, f"--{key}={value}")
        assert code == 2 and 1 <= len(said.splitlines()) <= 5 and "Traceback" not in said, said
        assert key.rpartition(".")[2] in said and "accessible" not in said, said
        assert canary.untouched(), value
    canary.would(bystander.Wrong)


@pytest.mark.parametrize("path", WRONG)
def test_a_tuner_of_another_kind(path: str, canary: Any, bystander: Any, litft: Any) -> None:
    """The verbs name their tuners; a file for `litft config check` may name any."""
    Path("mine.yaml").write_text(f"model:\n  tuner:\n    class_path: {path}\n")
    code, said = litft("config", "check", "mine.yaml")
    assert code == 2 and f"{path} is no Tuner" in said, said
    canary.would(bystander.function)


def test_what_is_said_of_them(model: Path, litft: Any) -> None:
    assert litft("finetune", model, "--trainer.callbacks", "os.system") == (
        2,
        "error: --trainer.callbacks: os.system is no Callback; give the class path of one\n",
    )
    assert "is none of Precision, " in litft("finetune", model, "--trainer.plugins", "os.system")[1]
    assert litft("finetune", model, "--model.optimizer", "os.system")[1].endswith("not a torch.optim.Optimizer\n")


def test_installed_classes_work(model: Path, canary: Any, bystander: Any, litft: Any) -> None:
    code, said = litft("finetune", model, "--trainer.callbacks", "bystander.Good", "--trainer.callbacks.word", "day")
    assert code == 0 and "GOOD day" in said, said
    spelt = json.dumps([{"class_path": "bystander.Good", "init_args": {"word": "x"}}])
    assert "GOOD x" in litft("finetune", model, f"--trainer.callbacks={spelt}")[1]
    assert litft("finetune", model, "--model.optimizer", "torch.optim.RAdam")[0] == 0
    canary.would(bystander.function)


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system ['touch FILE']", "object/apply:subprocess.call [[touch, FILE]]"]
)
def test_yaml_that_makes_objects(tag: str, model: Path, canary: Any, litft: Any) -> None:
    text = f"seed_everything: !!python/{tag}\n".replace("FILE", str(canary.file))
    Path("mine.yaml").write_text(text)
    code, said = litft("finetune", model, "--config", "mine.yaml")
    assert code == 2 and "mine.yaml:1: not YAML" in said
    code, said = litft("finetune", model, f"--trainer.callbacks={text.partition(': ')[2].strip()}")
    assert code == 2 and "Traceback" not in said
    canary.would(lambda: yaml.unsafe_load(text))


# ---- the current folder


@pytest.fixture
def littered(elsewhere: Path, canary: Any) -> Path:
    """A folder with data, and with modules that have no business there."""
    sys.modules.pop("evil", None)
    good = "from lightning import Callback\nclass X(Callback):\n    pass\n"
    (elsewhere / "evil.py").write_text(canary.code + good)
    for name in ("json", "torch", "lightning", "argparse", "typing", "yaml", "difflib"):
        (elsewhere / f"{name}.py").write_text(canary.code + "raise ImportError('not the real one')\n")
    return elsewhere


@pytest.mark.parametrize("key", KEYS)
def test_modules_of_the_current_folder(key: str, model: Path, littered: Path, canary: Any, litft: Any) -> None:
    assert str(littered) not in sys.path and "" not in sys.path  # as under the installed command
    code, said = litft("finetune", model, f"--{key}", "evil.X")
    assert code == 2, said
    spelt = json.dumps({"class_path": "evil.X"})
    if not key.startswith("model."):
        assert litft("finetune", model, f"--{key}={spelt}")[0] == 2
    if key == "model.tuner":
        Path("mine.yaml").write_text("model:\n  tuner: evil.X\n")
        assert "No module named 'evil'" in litft("config", "check", "mine.yaml")[1]

    def as_python_would() -> None:
        sys.path.insert(0, str(littered))
        try:
            import evil  # noqa: F401
        finally:
            sys.path.remove(str(littered))
            sys.modules.pop("evil", None)

    canary.would(as_python_would)


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose import path holds this checkout and nothing of ours."""
    here = str(Path(__file__).parents[2])
    paths = [here, environment.pop("also", "")]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)


STARTS = {
    "script": [str(Path(sys.executable).with_name("litft"))],
    "module": [sys.executable, "-m", "litft"],
    "torchrun": [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "1", "-m", "litft"],
}


@pytest.mark.parametrize("how", ["script", "module", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_processes_that_start_in_a_littered_folder(how: str, littered: Path, canary: Any) -> None:
    command = STARTS[how]
    if not Path(command[0]).exists():
        pytest.skip(f"{command[0]} is not installed")
    Path("mine.yaml").write_text("trainer:\n  callbacks: evil.X\n")
    done = start(*command, "config", "check", "mine.yaml")
    assert done.returncode != 0 and "No module named 'evil'" in done.stderr, done.stderr
    assert "not the real one" not in done.stderr
    canary.would(lambda: start(sys.executable, "-c", "import evil"))


def test_the_current_folder_on_pythonpath(elsewhere: Path, canary: Any) -> None:
    """Whoever wants its classes puts it there."""
    (elsewhere / "mine.py").write_text(canary.code + "from lightning import Callback\nclass X(Callback):\n    pass\n")
    Path("mine.yaml").write_text("trainer:\n  callbacks: mine.X\n")

    def check() -> None:
        done = start(*STARTS["module"], "config", "check", "mine.yaml", also=".")
        assert done.returncode == 0 and "mine.yaml: good" in done.stdout, done.stderr

    canary.would(check)
