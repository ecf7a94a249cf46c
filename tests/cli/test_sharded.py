"""Checkpoints in several files: every command reads them as it reads one file, or refuses them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.merges import run, write_recipe
from tests.host.models import Checkpoints, llama, save_model


def test_a_sharded_checkpoint_is_planned(tmp_path: Path) -> None:
    models = save_model(llama(), tmp_path / "one", tasks=1)
    shard = Checkpoints(tmp_path / "base", models.tuned)
    llama().save_pretrained(shard.base, max_shard_size="8KB")
    assert (shard.base / "model.safetensors.index.json").is_file()
    done = run("plan", write_recipe(tmp_path / "r.yml", shard), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rules"]
