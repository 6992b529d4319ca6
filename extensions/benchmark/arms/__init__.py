"""The arms of a race: each module has `run(job, recorder)`, and peers a `GRID` of settings to try."""
