"""The trackers that are found, beside what transformers finds; none is imported."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.trainer.both_arguments import ours, restored
from trainkit.trainer.tracker_names import TRACKERS, installed_trackers, tracker_list


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestTrackers:
    def test_none_means_what_transformers_finds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COMET_MODE", "DISABLED")
        found = transformers.integrations.get_available_reporting_integrations()
        assert installed_trackers() == found == ours(report_to=None).report_to == ours(report_to=["all"]).report_to

    def test_names_are_those_of_transformers(self) -> None:
        peers = set(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK)
        assert set(TRACKERS) == peers

    def test_found_by_name_without_import(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("wandb", "comet_ml", "mlflow", "dagshub", "trackio"):
            Path(tmp_path, f"{name}.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        assert {"wandb", "comet_ml", "mlflow", "dagshub", "trackio"} <= set(installed_trackers())
        monkeypatch.setenv("WANDB_DISABLED", "true")
        monkeypatch.setenv("COMET_MODE", "DISABLED")
        monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "TRUE")
        assert not {"wandb", "comet_ml", "mlflow"} & set(installed_trackers())

    def test_none_is_none(self) -> None:
        assert tracker_list("none") == tracker_list([]) == []
