"""What a run writes holds nothing of the machine and the user that it was not given to write."""

import os
import subprocess
import sys
from pathlib import Path

CANARY = "canary-7f3a"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PASSWORD")


def test_no_secret_of_the_environment_is_written(tmp_path: Path) -> None:
    home = tmp_path / f"home-{CANARY}"
    home.mkdir()
    (home / "text.txt").write_text("To be or not to be. " * 400)
    secrets = {name: f"{CANARY}-{name}" for name in NAMES}
    proxy = {"HTTPS_PROXY": f"http://user:{CANARY}@localhost:1"}
    command = [sys.executable, "-m", "recipes.pretrain_lm", "--data", str(home), "--folder", str(tmp_path / "run")]
    small = (
        "--strategy eager --steps 3 --seq-len 16 --batch-size 2 --num-layers 1 --num-heads 2 --width 16 --save-every 1"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | secrets | proxy | {"HOME": str(home), "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *small.split()], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) > 10
    assert [file.name for file in written if CANARY.encode() in file.read_bytes()] == []
