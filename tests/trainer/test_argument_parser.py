"""HfArgumentParser beside that of transformers 4.57: the same objects from the same words and files."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.both_arguments import described, restored
from trainkit.trainer.argument_parser import HfArg, HfArgumentParser, string_to_bool
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.seq2seq_arguments import Seq2SeqTrainingArguments


class Color(Enum):
    RED = "red"
    ONE = 1


@dataclass
class Options:
    """A field of each kind that both parsers read."""

    needed: int
    number: float = 0.5
    text: str = "a"
    switch: bool = False
    on_by_default: bool = True
    maybe: Optional[bool] = None  # noqa: UP045
    maybe_number: Union[int, None] = None  # noqa: UP007
    new_union: str | None = None
    color: Color = "red"
    literal: Literal["x", 2] = "x"
    numbers: list[int] = field(default_factory=lambda: [1, 2])
    maybe_texts: list[str] | None = None
    color_or_text: Color | str = "red"
    named: str = HfArg(default="n", aliases=["-n", "--alias"], help="Named.")

    def __post_init__(self) -> None:
        self.color = Color(self.color)


HOME = ["--output_dir", "out", "--logging_dir", "logs", "--report_to", "none"]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestCommandLine:
    @pytest.mark.parametrize(
        "words",
        [
            "",
            "--number 1e-3 --text b",
            "--switch",
            "--switch false --on_by_default no",
            "--switch=1 --no_on_by_default",
            "--no-on-by-default --maybe-number 3",
            "--maybe True --new_union c",
            "--maybe n",
            "--color 1 --literal 2",
            "--color red --color_or_text 1",
            "--numbers 3 4 5 --maybe_texts a b",
            "--numbers 3",
            "-n x",
            "--alias y",
        ],
    )
    def test_objects_are_those_of_transformers(self, words: str) -> None:
        line = ["--needed", "7", *words.split()]
        mine = HfArgumentParser(Options).parse_args_into_dataclasses(line, look_for_args_file=False)
        peer = transformers.HfArgumentParser(Options).parse_args_into_dataclasses(line, look_for_args_file=False)
        assert mine == peer and [type(v) for v in vars(mine[0]).values()] == [type(v) for v in vars(peer[0]).values()]

    @pytest.mark.parametrize(
        "words",
        ["", "--needed x", "--needed 1 --switch maybe", "--needed 1 --color blue", "--needed 1 --literal 3",
         "--needed 1 --maybe", "--needed 1 --numbers a"],
    )  # fmt: skip
    def test_what_does_not_fit_ends_the_program(self, words: str, capsys: pytest.CaptureFixture[str]) -> None:
        for parser in (HfArgumentParser(Options, prog="p"), transformers.HfArgumentParser(Options, prog="p")):
            with pytest.raises(SystemExit):
                parser.parse_args_into_dataclasses(words.split(), look_for_args_file=False)
        assert "error: " in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words",
        [
            "--learning_rate 1e-3 --per-device-train-batch-size 4 --eval_strategy steps --eval_steps 0.1",
            "--bf16 --use_cpu --optim adafactor --lr_scheduler_type cosine --no_dataloader_pin_memory",
            "--report_to wandb --fsdp full_shard --max_steps 5 --greater_is_better true",
            '--gradient_checkpointing --gradient_checkpointing_kwargs {"use_reentrant":"false"}',
            "--label_names a b --include_for_metrics inputs loss --debug underflow_overflow",
            "--log_level info --half_precision_backend cpu_amp --save_total_limit 2",
            "--include_num_input_tokens_seen --dataloader_drop_last --dataloader_num_workers 2",
        ],
    )
    def test_training_arguments_are_those_of_transformers(self, words: str) -> None:
        line = [*HOME, "--needed", "1", *words.split()]
        options, mine = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses(line)
        same, peer = transformers.HfArgumentParser(
            (Options, transformers.TrainingArguments)
        ).parse_args_into_dataclasses(line)
        assert options == same and described(mine) == described(peer)

    def test_a_nested_option_is_that_of_transformers(self) -> None:
        """Beside its arguments: its parser takes the text for a dictionary or not, by what was imported before."""
        text = '{"split_batches":true}'
        (mine,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*HOME, "--accelerator_config", text])
        (home,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses(HOME)
        given = {name: getattr(home, name) for name in ("output_dir", "report_to", "use_cpu", "logging_dir")}
        assert described(mine) == described(transformers.TrainingArguments(**given, accelerator_config=text))

    def test_the_parser_of_transformers_reads_ours(self) -> None:
        line = [*HOME, "--bf16_full_eval", "false", "--optim", "sgd", "--accelerator_config", '{"even_batches": false}']
        for kind in (TrainingArguments, Seq2SeqTrainingArguments):
            (args,) = transformers.HfArgumentParser(kind).parse_args_into_dataclasses(line)
            (mine,) = HfArgumentParser(kind).parse_args_into_dataclasses(line)
            assert args == mine

    @pytest.mark.parametrize(
        ("words", "name", "value"),
        [
            (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
            (["--fsdp", "full_shard", "auto_wrap"], "fsdp", ["full_shard", "auto_wrap"]),
            (["--fsdp", "full_shard auto_wrap"], "fsdp", ["full_shard", "auto_wrap"]),
            (["--optim_target_modules", "all-linear"], "optim_target_modules", "all-linear"),
            (["--optim_target_modules", "a", "b"], "optim_target_modules", ["a", "b"]),
            (["--include_num_input_tokens_seen", "non_padding"], "include_num_input_tokens_seen", "non_padding"),
            (["--include_num_input_tokens_seen", "true"], "include_num_input_tokens_seen", "all"),
            (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], "lr_scheduler_kwargs", {"num_cycles": 2}),
            (["--liger_kernel_config", '{"rope": true}'], "liger_kernel_config", {"rope": True}),
        ],
        ids=str,
    )
    def test_what_transformers_cannot_read(self, words: list[str], name: str, value: Any) -> None:
        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*HOME, *words])
        assert getattr(args, name) == value

    def test_a_json_object_that_is_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        for text in ("[1]", "{"):
            with pytest.raises(SystemExit):
                HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*HOME, "--liger_kernel_config", text])
        assert "expected a JSON object" in capsys.readouterr().err

    def test_other_options_and_remaining_words(self) -> None:
        parser = HfArgumentParser(Options)
        parser.add_argument("--extra", type=int, default=3)
        options, extra, rest = parser.parse_args_into_dataclasses(
            ["--needed", "1", "--odd", "x"], return_remaining_strings=True
        )
        assert (options.needed, extra.extra, rest) == (1, 3, ["--odd", "x"])
        with pytest.raises(ValueError, match="--odd"):
            parser.parse_args_into_dataclasses(["--needed", "1", "--odd", "x"])

    def test_help_has_groups_sentences_and_defaults(self) -> None:
        @dataclass
        class Grouped:
            width: int = HfArg(default=3, help="Width of it.")
            _argument_group_name = "shape"

        text = HfArgumentParser((Grouped, TrainingArguments)).format_help()
        assert "shape:" in text and "Width of it. (default: 3)" in text
        assert "Peak learning rate. (default: 5e-05)" in text and "Optimizer. (default: adamw_torch_fused)" in text

    def test_types_that_cannot_be_read(self) -> None:
        @dataclass
        class Odd:
            value: int | float = 1

        with pytest.raises(ValueError, match=r"value: got a field of type int \| float"):
            HfArgumentParser(Odd)

    def test_annotations_that_cannot_be_resolved(self) -> None:
        odd = dataclasses.make_dataclass("Odd", [("value", "NotThere", 1)])
        with pytest.raises(RuntimeError, match="Odd: its annotations cannot be resolved"):
            HfArgumentParser(odd)

    @given(st.sampled_from(["yes", "True", "T", "y", "1", "no", "FALSE", "f", "N", "0"]))
    def test_words_for_booleans(self, word: str) -> None:
        assert string_to_bool(word) == transformers.hf_argparser.string_to_bool(word)


class TestArgumentFiles:
    def test_later_words_win(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = tmp_path / "train.py"
        Path(tmp_path, "train.args").write_text("--needed 1 --text file")
        Path(tmp_path, "more").write_text("--text more\n--number 2")
        Path(tmp_path, "last").write_text("--number 3")
        monkeypatch.setattr(sys, "argv", [str(script), "--switch"])
        files = ["--conf", str(tmp_path / "more"), "--conf", str(tmp_path / "last")]
        found = []
        for parser in (HfArgumentParser(Options), transformers.HfArgumentParser(Options)):
            found.append(
                [
                    parser.parse_args_into_dataclasses(),
                    parser.parse_args_into_dataclasses(["--text", "line"]),
                    parser.parse_args_into_dataclasses(["--text", "line", *files], args_file_flag="--conf"),
                    parser.parse_args_into_dataclasses(files, args_file_flag="--conf"),
                    parser.parse_args_into_dataclasses(["--needed", "2"], args_filename=str(tmp_path / "last")),
                    parser.parse_args_into_dataclasses(["--needed", "2"], args_filename=str(tmp_path / "missing")),
                    parser.parse_args_into_dataclasses(["--needed", "2"], look_for_args_file=False),
                ]
            )
        assert found[0] == found[1]
        assert found[0][0][0].text == "file" and found[0][2][0].text == "line" and found[0][3][0].number == 3


class TestFiles:
    CONTENT: ClassVar[dict[str, Any]] = {
        "needed": 1,
        "numbers": [4],
        "output_dir": "out",
        "learning_rate": 0.1,
        "report_to": "none",
    }

    def test_json_yaml_and_dict(self, tmp_path: Path) -> None:
        parser = HfArgumentParser((Options, TrainingArguments))
        options, args = parser.parse_dict(self.CONTENT)
        Path(tmp_path, "a.json").write_text(json.dumps(self.CONTENT))
        # JSON is YAML.
        Path(tmp_path, "a.yaml").write_text(json.dumps(self.CONTENT))
        for read in (parser.parse_json_file, parser.parse_yaml_file):
            suffix = "json" if read == parser.parse_json_file else "yaml"
            same, mine = read(tmp_path / f"a.{suffix}")
            assert same == options and dataclasses.replace(mine, logging_dir=args.logging_dir) == args
        assert (options.needed, options.numbers, args.learning_rate) == (1, [4], 0.1)

    def test_yaml_reads_numbers_without_a_dot(self, tmp_path: Path) -> None:
        text = "needed: 1\nnumber: 1e-4\ntext: 1e-4a\nmaybe_texts: ['1e-4', 2e, e5]"
        Path(tmp_path, "a.yaml").write_text(text)
        (options,) = HfArgumentParser(Options).parse_yaml_file(str(tmp_path / "a.yaml"))
        assert (options.number, options.text, options.maybe_texts) == (1e-4, "1e-4a", ["1e-4", "2e", "e5"])

    def test_names_that_nobody_has(self) -> None:
        parser = HfArgumentParser((Options, TrainingArguments))
        with pytest.raises(ValueError, match=r"unknown names \['odd'\], expected fields of Options, TrainingArguments"):
            parser.parse_dict({**self.CONTENT, "odd": 1})
        options, _ = parser.parse_dict({**self.CONTENT, "odd": 1}, allow_extra_keys=True)
        assert options.needed == 1

    def test_arguments_written_by_a_run_are_read(self, tmp_path: Path) -> None:
        (args,) = HfArgumentParser(TrainingArguments).parse_dict({"output_dir": "out", "report_to": "none"})
        Path(tmp_path, "args.json").write_text(args.to_json_string())
        assert HfArgumentParser(TrainingArguments).parse_json_file(tmp_path / "args.json") == (args,)


def test_no_dataclass_is_a_plain_parser() -> None:
    parser = HfArgumentParser(description="plain")
    parser.add_argument("--x", type=int)
    (namespace,) = parser.parse_args_into_dataclasses(["--x", "1"])
    assert namespace.x == 1
