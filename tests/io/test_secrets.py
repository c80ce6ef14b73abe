"""What a run writes holds nothing of the machine and the user that it was not given to write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CANARY = "canary-7f3a"
NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "PASSWORD", "SSH_AUTH_SOCK", "PYTHON_KEYRING_BACKEND",
)  # fmt: skip
URLS = {
    "HTTPS_PROXY": f"http://user:{CANARY}@localhost:1",
    "HF_ENDPOINT": f"http://{CANARY}@localhost:1",
    "DATABASE_URL": f"postgresql://user:{CANARY}@localhost/runs?sslmode=require&password={CANARY}",
}
ROOT = Path(__file__).parents[2]
SMALL = "--strategy eager --steps 3 --seq-len 16 --batch-size 2 --num-layers 1 --num-heads 2 --width 16 --save-every 1"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / f"home-{CANARY}"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(f"{CANARY}-stored")
    (home / ".netrc").write_text(f"machine localhost login user password {CANARY}\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.txt").write_text("To be or not to be. " * 400)
    secrets = {name: f"{CANARY}-{name}" for name in NAMES}
    own = {"HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **secrets, **URLS, **own}


def train(folder: Path, environment: dict[str, str], *more: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "recipes.pretrain_lm", "--data", "texts", "--folder", "run", *SMALL.split(), *more]
    return subprocess.run(command, env=environment, capture_output=True, cwd=folder)


def holding(folder: Path, done: "subprocess.CompletedProcess[bytes]") -> list[str]:
    """What of all that a run left holds a secret."""
    written = {str(file): file.read_bytes() for file in (folder / "run").rglob("*") if file.is_file()}
    assert len(written) > 4
    contents = {**written, "output": done.stdout, "error": done.stderr}
    return [name for name, content in contents.items() if CANARY.encode() in content]


def test_no_secret_of_the_machine_is_written(tmp_path: Path, environment: dict[str, str]) -> None:
    done = train(tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert holding(tmp_path, done) == []


def test_no_secret_is_written_by_a_run_that_fails(tmp_path: Path, environment: dict[str, str]) -> None:
    done = train(tmp_path, environment, "--learning-rate", "1e38", "--log-every", "1")
    assert done.returncode == 1
    assert b"Traceback (most recent call last)" in done.stderr
    assert holding(tmp_path, done) == []
