"""``sample_prompt``: what is sampled, where it is kept, and that training does not notice."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from processes import run_command
from safetensors.torch import load_file

import rwkv_rev
from rwkv_rev.conversation import Chat
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.loading import load_model, load_tokenizer
from rwkv_rev.sampling import Sampling
from rwkv_rev.training.callbacks import StopAtBadLoss, read_log
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.finetune import plan
from rwkv_rev.training.samples import Samples, encoded_prompts, quoted, read_prompts

PROMPT, OTHER = "7 squared", "def main"
Settings = Callable[..., FinetuneConfig]


@pytest.fixture
def config(shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    data = counting_text(tmp_path / "data.txt", 100)

    def make(output: str = "out", version: str = "5.2", **changes: Any) -> FinetuneConfig:
        values = {"context_length": 64, "chunk_length": 32, "lr": 1e-2, "max_steps": 2} | changes
        return settings(shallow[version], data, tmp_path / output, **values)

    return make


def sampled(output: str | Path) -> list[dict[str, Any]]:
    path = Path(output) / "training" / "samples.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora-dropout": {"tune": "lora", "lora_rank": 4, "lora_dropout": 0.5},
    "state": {"tune": "state"},
    "packed": {"pack": True, "version": "7"},
    "carried": {"carry_state": True, "context_length": 32, "max_steps": 4},
    "blocks": {"checkpoint_blocks": True, "version": "6"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_does_not_notice(config: Settings, case: str) -> None:
    """Weights and losses to the bit as without samples, which are taken before, between and after the steps."""
    finetune(config("without", **CASES[case]))
    finetune(config("with", **CASES[case], eval_every=1, sample_prompt=[PROMPT, OTHER], sample_tokens=6))
    assert losses(Path("with")) == losses(Path("without"))
    one, other = (load_file(Path(name) / "model.safetensors") for name in ("with", "without"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    steps = CASES[case].get("max_steps", 2)
    rows = sampled("with")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in range(steps + 1) for prompt in (PROMPT, OTHER)
    ]
    assert all(row.keys() == {"step", "prompt", "text"} and row["text"] for row in rows)


def test_generators_and_modes_are_set_back(
    config: Settings, shallow: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(shallow["5.2"], "cpu", torch.float32).train()
    model.model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    samples = Samples(
        model, load_tokenizer(shallow["5.2"]), config(sample_prompt=[PROMPT]), tmp_path / "samples.jsonl"
    )
    before = torch.get_rng_state()
    (row,) = samples.take(3, True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert samples.take(4, False) == [], "the first process alone"
    assert read_log(tmp_path / "samples.jsonl") == [row] and samples.step == 4


@pytest.mark.parametrize("tune", ["full", "state"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_is_what_generate_makes(config: Settings, tune: str, temperature: float) -> None:
    """Of the model before the first step and of the output, with its tuned initial state and the run's seed."""
    settings = config(
        tune=tune, seed=5, sample_prompt=[PROMPT], sample_tokens=12, sample_temperature=temperature
    )
    finetune(replace(settings, lr=3.0 if tune == "state" else 1e-2))
    first, last = sampled("out")
    assert (first["step"], last["step"]) == (0, 2) and first["text"] != last["text"]
    for folder, row in ((settings.model, first), ("out", last)):
        text = rwkv_rev.generate(
            folder, PROMPT, max_new_tokens=12, temperature=temperature, seed=5, device="cpu"
        )
        assert text == PROMPT + row["text"]


def test_samples_of_a_lora(config: Settings) -> None:
    finetune(config(tune="lora", lora_rank=4, lr=5e-2, sample_prompt=[PROMPT], sample_temperature=0.0))
    first, last = sampled("out")
    assert first["text"] != last["text"]
    assert PROMPT + last["text"] == rwkv_rev.generate(
        "out", PROMPT, max_new_tokens=64, temperature=0, device="cpu"
    )


def test_turns_of_a_chat(config: Settings, tmp_path: Path) -> None:
    """The prompt is what the user says, in the run's own chat template; the answer ends where its turn does."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %} {{ m['content'] }};"
        "{% endgeneration %}{% else %}Q: {{ m['content'] }};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    (tmp_path / "template.jinja").write_text(template)
    turns = [{"role": "user", "content": "5?"}, {"role": "assistant", "content": "25"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    settings = config(
        chat_template="template.jinja",
        max_steps=12,
        sample_prompt=["5?"],
        sample_chat=True,
        sample_temperature=0.0,
    )
    finetune(replace(settings, data=["chat.jsonl"]))
    row = sampled("out")[-1]
    model, tokenizer = load_model("out", "cpu", torch.float32).eval(), load_tokenizer("out")
    assert row["text"] == Chat(model, tokenizer).say("5?", Sampling(0.0), max_new_tokens=64)
    assert row["text"] == "25", "learned by heart, and ended by the template's end of a turn"


def test_a_resumed_run_keeps_and_takes_the_same(config: Settings) -> None:
    settings = config(
        version="4", max_steps=4, save_every=2, eval_every=1, sample_prompt=[PROMPT], sample_tokens=5
    )
    finetune(replace(settings, output="whole"))

    def stop(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(StopAtBadLoss, "on_log", stop)
        finetune(settings)
    there = settings.working_directory / "samples.jsonl"
    assert [row["step"] for row in read_log(there)] == [0, 1, 2, 3]
    with there.open("a") as file:
        file.write('{"step": 4, "pro')
    finetune(replace(settings, resume="auto"))
    assert sampled("out") == sampled("whole") and len(sampled("out")) == 5


def test_only_before_and_after(config: Settings) -> None:
    """Without ``eval_every``, as held-out text is read; also where it is, and after a kill when all was trained."""
    settings = config(
        version="4", sample_prompt=[PROMPT], sample_tokens=5, save_every=1, eval_data=["data.txt"]
    )
    settings.eval_tokens = 32
    finetune(settings)
    assert [row["step"] for row in sampled("out")] == [0, 2]
    settings = replace(settings, output="other", eval_data=[], eval_tokens=0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        finetune(settings)
    result = finetune(replace(settings, resume="auto"))
    assert sampled("other") == sampled("out")
    assert result.samples == result.output / "training" / "samples.jsonl" and result.held_out is None


def test_what_is_told(config: Settings) -> None:
    """The whole sample, line by line, each set off from what the program says; control characters escaped."""
    told: list[str] = []
    prompt = "one\ntwo \x1b[2J" + "x" * 200
    finetune(config(version="4", sample_prompt=[prompt], sample_tokens=5), notify=told.append)
    at = told.index("step 0, sample 1 of 1:")
    lines = [line for line in told[at + 1 :] if line.startswith("  | ")]
    assert (
        lines[0] == "  | one"
        and lines[1].startswith(r"  | two \x1b[2J")
        and all(len(line) <= 80 for line in lines)
    )
    assert all(line.isprintable() for line in told)
    assert sum(line.count("x") for line in lines) >= 2 * 200 and "step 2, sample 1 of 1:" in told


@pytest.mark.parametrize("text", ["", "\n", "a\n\n b", "a  b " * 40, "é\u202ex\r", "-" * 300])
def test_quoted_is_whole(text: str) -> None:
    lines = quoted(text)
    assert all(line.startswith("  | ") and len(line) <= 80 and line.isprintable() for line in lines)
    joined = "".join(line[4:] for line in lines)
    assert joined == "".join(part if part.isprintable() else quoted(part)[0][4:] for part in text.split("\n"))


def test_prompts_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_bytes("User: é\n\nAssistant:\n".encode())
    assert read_prompts(["@prompt.txt", "@@decorated", "plain @x"]) == [
        "User: é\n\nAssistant:",
        "@decorated",
        "plain @x",
    ]
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9")
    for name, why in (
        ("absent.txt", "the file cannot be read: No such file"),
        ("latin.txt", "the file is no UTF-8 text"),
        (".", "the file cannot be read"),
        ("\0", "the file cannot be read"),
    ):
        with pytest.raises(ConfigError, match=why) as error:
            read_prompts([f"@{name}"])
        assert "@@ begins a prompt with an @" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_prompt": [""]}, "^sample_prompt holds an empty text; leave it out"),
        ({"sample_prompt": ["@empty.txt"]}, "^sample_prompt holds no tokens; give at least one character"),
        ({"sample_prompt": [" "], "sample_chat": True}, "^sample_prompt holds no tokens"),
        ({"sample_prompt": ["@absent.txt"]}, "^sample_prompt @absent.txt: the file cannot be read"),
        ({"sample_tokens": 5}, "^sample_tokens belongs to sample_prompt=TEXT; this run has none"),
        ({"sample_chat": True}, "^sample_chat belongs to sample_prompt=TEXT; this run has none"),
        ({"sample_temperature": 0.5}, "^sample_temperature belongs to sample_prompt=TEXT"),
        (
            {"sample_prompt": ["a"], "sample_temperature": -1.0},
            "^sample_temperature = -1.0 must be 0, or at least",
        ),
        ({"sample_prompt": ["a"], "sample_temperature": 0.001}, "must be 0, or at least 0.01"),
        ({"sample_prompt": ["a"], "sample_tokens": 0}, "^sample_tokens = 0 must be at least 1"),
        (
            {"eval_every": 5},
            "^eval_every needs held-out text: eval_data=FILE .or prompts: sample_prompt=TEXT",
        ),
    ],
)
def test_refusals(config: Settings, changes: dict[str, Any], message: str) -> None:
    Path("empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match=message) as error:
        plan(config(**changes))
    assert "\n" not in str(error.value) and not Path("out.training").exists()


def test_tokens_that_the_model_has_not(config: Settings, shallow: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(shallow["5.2"])
    with pytest.raises(
        DataError, match="token id 122 of sample_prompt 'az' is outside the model's vocabulary of 100"
    ):
        encoded_prompts(config(sample_prompt=["az"]), tokenizer, 100)


def test_a_chat_template_that_chats_cannot_be_held_with(config: Settings) -> None:
    """Refused before the first step."""
    Path("template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}!")
    settings = config(sample_prompt=["hi"], sample_chat=True, chat_template="template.jinja")
    with pytest.raises(ConfigError, match="the chat template writes a turn"):
        finetune(settings)
    assert not read_log(settings.working_directory / "log.jsonl") and not Path("out").exists()


def test_python_takes_one_text_or_several(config: Settings, tmp_path: Path) -> None:
    values = config(version="4", sample_tokens=3, max_steps=1).to_dict()
    given = {name: values.pop(name) for name in ("model", "data", "output")}
    for prompts in (PROMPT, [PROMPT, OTHER], (PROMPT,)):
        result = rwkv_rev.finetune(**given, **values | {"sample_prompt": prompts, "force": True})
        assert {row["prompt"] for row in sampled(result.output)} == (
            {PROMPT} if isinstance(prompts, str) else {*prompts}
        )


def test_the_command_line(cli: Callable[..., tuple[int, str, str]], config: Settings) -> None:
    settings = config()
    common = ["finetune", settings.model, "--data", "data.txt", "--output", "out", "--device", "cpu"]
    common += ["--context-length", 64, "--max-steps", 1]
    more = [
        "--sample-prompt",
        PROMPT,
        "--sample-prompt",
        OTHER,
        "--sample-tokens",
        4,
        "--sample-temperature",
        0,
    ]
    code, out, _ = cli(*common, "--dry-run")
    assert code == 0 and "sample_" not in out
    code, out, _ = cli(*common, *more, "--dry-run")
    assert code == 0 and re.search(r"sample_tokens +4", out) and PROMPT in out
    code, out, _ = cli(*common, *more, "--dry-run", "--json")
    assert json.loads(out)["settings"]["sample_prompt"] == [PROMPT, OTHER]
    code, out, err = cli(*common, *more)
    assert code == 0 and "out/training/samples.jsonl" in out.replace("\\", "/"), err
    for number, prompt in enumerate((PROMPT, OTHER), 1):
        assert f"step 1, sample {number} of 2:\n  | {prompt}" in err


@pytest.mark.dist
def test_of_two_processes_the_first_samples(config: Settings) -> None:
    """And the other waits for it in its next step."""
    changes: dict[str, Any] = {"eval_every": 1, "eval_data": ["data.txt"], "eval_tokens": 64, "patience": 1}
    settings = config("one", version="4", keep_best=True, sample_prompt=[PROMPT], sample_tokens=5, **changes)
    done = run_command(
        *("finetune", settings.model, "--data", "data.txt", "--output", "two", "--device", "cpu", "--quiet"),
        *("--context-length", 64, "--max-steps", 2, "--warmup", 1, "--lr", settings.lr, "--save-every", 0),
        *("--eval-data", "data.txt", "--eval-every", 1, "--set", "eval_tokens=64", "--keep-best"),
        *("--patience", 1, "--sample-prompt", PROMPT, "--sample-tokens", 5),
        world=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    finetune(settings)
    assert losses(Path("two")) == pytest.approx(losses(Path("one")), rel=2e-5)
    assert [row["step"] for row in sampled("two")] == [0, 1, 2] and sampled("two")[0] == sampled("one")[0]
    assert done.stderr.count("sample 1 of 1:") == 3
