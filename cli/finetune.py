"""``rwkv-rev finetune``: data in, adapted model out."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import count, length, number, whole
from rwkv_rev.cli.options import refuse_both_prints
from rwkv_rev.cli.stopping import tell
from rwkv_rev.folders.folder import refuse_no_model
from rwkv_rev.folders.safe_output import refuse_inputs
from rwkv_rev.training.lora_targets import refuse_early
from rwkv_rev.training.sources import find_sources

BEYOND = "beyond the loaded program"
"""What is forecast and what is reported: the most that weights, gradients, optimizer and graph take at once."""
Text = str | None
Number = int | None
Texts = list[str] | None


def finetune(
    model: Annotated[
        Text, typer.Argument(metavar="[DIR]", help="A model folder; --config FILE may name it instead.")
    ] = None,
    data: Annotated[
        Texts,
        typer.Option(
            metavar="SOURCE",
            help="Files, folders, globs or hf:owner/name; repeatable. Read: .txt .md .rst .py .jsonl .json .csv "
            "(each also .gz), .parquet, .bin/.idx, folders of datasets.save_to_disk.",
        ),
    ] = None,
    output: Annotated[Text, typer.Option(help="The model folder to make.")] = None,
    context_length: Annotated[
        Number,
        typer.Option(
            parser=count, metavar="T", help="Most tokens one gradient goes through, or 16k, 1m.  [16k]"
        ),
    ] = None,
    chunk_length: Annotated[
        Any,
        typer.Option(
            parser=length, metavar="C", help="Tokens per chunk; auto: the most that fit, up to 16k.  [auto]"
        ),
    ] = None,
    bptt: Annotated[
        Text, typer.Option(help="auto, full, checkpoint, reversible, truncated, ...  [auto]")
    ] = None,
    tape: Annotated[Text, typer.Option(help="host, device or disk.  [host]")] = None,
    remnants: Annotated[
        Text, typer.Option(help="What the tape keeps of RWKV-7's states: auto, whole, lifted.  [auto]")
    ] = None,
    batch_size: Annotated[
        Number, typer.Option(parser=whole(), metavar="N", help="Rows at once per process.  [1]")
    ] = None,
    grad_accum: Annotated[
        Number, typer.Option(parser=whole(), metavar="N", help="Batches per optimizer step.  [1]")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(parser=number(), metavar="X", help="Learning rate.  [full 1e-4, lora 5e-4, state 0.1]"),
    ] = None,
    lr_schedule: Annotated[Text, typer.Option(help="cosine, linear, constant, ...  [cosine]")] = None,
    warmup: Annotated[
        float | None,
        typer.Option(parser=number(), metavar="X", help="Warmup steps; below 1 a share of all.  [0.03]"),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(parser=number(), metavar="X", help="Of matrices.  [0]")
    ] = None,
    max_steps: Annotated[
        Number, typer.Option(parser=whole(), metavar="N", help="Optimizer steps; replaces --epochs.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(parser=number(), metavar="X", help="Passes over the data.  [1]")
    ] = None,
    dtype: Annotated[
        Text, typer.Option(help="Arithmetic: auto, float32, bfloat16, float16. Weights train in float32.")
    ] = None,
    tune: Annotated[
        Literal["full", "lora", "state"] | None,
        typer.Option(help="Everything, low-rank additions, or the initial state.  [full]"),
    ] = None,
    quantise: Annotated[
        Literal["nf4", "int8"] | None,
        typer.Option(help="Frozen weights in 4 or 8 bits (bitsandbytes); lora then makes an adapter alone."),
    ] = None,
    lora_rank: Annotated[
        Number, typer.Option(parser=whole(), metavar="N", help="Rank of the additions.  [32]")
    ] = None,
    lora_targets: Annotated[
        Text, typer.Option(help="Linear maps with an addition, comma-separated.  [all but the head]")
    ] = None,
    shard_optimizer: Annotated[
        bool | None,
        typer.Option("--shard-optimizer", help="Spread the optimizer's state over the processes."),
    ] = None,
    shard_model: Annotated[
        bool | None,
        typer.Option("--shard-model", help="Spread weights, gradients and optimizer over the processes."),
    ] = None,
    context_parallel: Annotated[
        Number,
        typer.Option(parser=whole(), metavar="N", help="Processes that share every row's chunks.  [1]"),
    ] = None,
    carry_state: Annotated[
        bool | None,
        typer.Option("--carry-state", help="Long documents go on with their state; gradient cut per row."),
    ] = None,
    pack: Annotated[
        bool | None, typer.Option("--pack", help="Several documents in one row, each from its own start.")
    ] = None,
    objective: Annotated[
        Text,
        typer.Option(
            metavar="NAME[:KEY=VALUE],...",
            help="next-token, position-weighted, second-pass, recall, adapt, or several.  [next-token]",
        ),
    ] = None,
    text_field: Annotated[Text, typer.Option(help="Field of the text in records.  [text]")] = None,
    prompt_field: Annotated[Text, typer.Option(help="Field of the prompt; no loss on it.  [prompt]")] = None,
    completion_field: Annotated[Text, typer.Option(help="Field of the completion.  [completion]")] = None,
    messages_field: Annotated[Text, typer.Option(help="Field of a list of turns.  [messages]")] = None,
    data_format: Annotated[
        Text, typer.Option(help="auto, text, completion, messages, instruction or chosen.  [auto]")
    ] = None,
    train_on: Annotated[
        Literal["assistant", "all", "last"] | None,
        typer.Option(help="What has loss: the assistant's turns, everything, its last turn."),
    ] = None,
    chat_template: Annotated[
        Text,
        typer.Option(
            metavar="FILE", help="Template of conversations, saved with the model.  [User: and Assistant:]"
        ),
    ] = None,
    seed: Annotated[
        Number, typer.Option(parser=whole(), metavar="N", help="Of data order and new parameters.  [0]")
    ] = None,
    eval_data: Annotated[Texts, typer.Option(metavar="SOURCE", help="Held-out data; repeatable.")] = None,
    eval_every: Annotated[
        Number, typer.Option(parser=whole(), metavar="N", help="Steps between evaluations.")
    ] = None,
    sample_prompt: Annotated[
        Texts,
        typer.Option(
            metavar="TEXT|@FILE", help="Show what the model makes of it at each evaluation; repeatable."
        ),
    ] = None,
    sample_tokens: Annotated[
        Number, typer.Option(parser=whole(), metavar="N", help="Most tokens of a sample.  [64]")
    ] = None,
    sample_temperature: Annotated[
        float | None, typer.Option(parser=number(), metavar="X", help="0 takes the likeliest token.  [1]")
    ] = None,
    sample_chat: Annotated[
        bool | None,
        typer.Option("--sample-chat", help="Prompts are turns of the user, samples the answers."),
    ] = None,
    keep_best: Annotated[
        bool | None,
        typer.Option("--keep-best", help="OUTPUT holds the step with the lowest held-out loss."),
    ] = None,
    patience: Annotated[
        Number,
        typer.Option(
            parser=whole(), metavar="N", help="Stop after so many evaluations without a lower held-out loss."
        ),
    ] = None,
    save_every: Annotated[
        Number,
        typer.Option(parser=whole(), metavar="N", help="Steps between checkpoints; 0 for none.  [100]"),
    ] = None,
    save_total: Annotated[
        Number,
        typer.Option(
            parser=whole(), metavar="N", help="Newest checkpoints that stay, beside the best one.  [2]"
        ),
    ] = None,
    resume: Annotated[
        Text, typer.Option(metavar="auto|PATH", help="Go on from the newest or a named checkpoint.")
    ] = None,
    report_to: Annotated[Text, typer.Option(help="none, tensorboard, wandb or trackio.  [none]")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu or cuda.  [auto]")] = None,
    cache_dir: Annotated[
        Text,
        typer.Option(
            help="Where tokenised data is kept (default: tokens in $RWKV_REV_CACHE, else in rwkv-rev under $HF_HOME)."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Settings; options here win over it.")
    ] = None,
    set_: Annotated[
        Texts, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; repeatable.")
    ] = None,
    push_to_hub: Annotated[Text, typer.Option(metavar="OWNER/NAME", help="Upload the result.")] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Replace an existing output and an unfinished run.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, data, memory and steps; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the path.")] = False,
) -> None:
    r"""Fine-tune a converted model over long contexts, with the exact gradient of each whole context.

    OUTPUT is a normal model folder with a log and a loss curve. Under torchrun or accelerate launch every
    process takes its share of the data.

    Examples:

      rwkv-rev finetune my-model --data book.txt --output my-book \
        --context-length 65536 --max-steps 100

      rwkv-rev finetune my-model --data chats.jsonl --output tuned \
        --tune lora --lora-rank 16

      rwkv-rev finetune my-model --data chats.jsonl --output adapter \
        --tune lora --quantise nf4

      rwkv-rev finetune my-model --data rwkv-chats.jsonl --output tuned \
        --train-on last

      rwkv-rev finetune my-model --data book.txt --output my-book \
        --eval-data more.txt --eval-every 50 --keep-best --sample-prompt "Once"

      torchrun --nproc-per-node 2 -m rwkv_rev.cli finetune \
        my-model --data corpus/ --output tuned

      accelerate launch --multi_gpu --num_processes 2 -m rwkv_rev.cli finetune \
        my-model --data corpus/ --output tuned
    """
    given: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name not in ("config", "set_", "dry_run", "as_json", "quiet", "lora_targets")
    }
    if lora_targets is not None:
        given["lora_targets"] = [name.strip() for name in lora_targets.split(",") if name.strip()]
    refuse_both_prints(as_json, quiet)
    from rwkv_rev.training.config import build_config

    settings = build_config(file=config, pairs=set_ or (), options=given)
    settings.check()
    refuse_no_model(settings.model)  # before anything heavy is imported
    refuse_early(settings.model, settings.lora_targets)
    find_sources([*settings.data, *settings.eval_data])
    refuse_inputs(Path(settings.output), [config])
    from rwkv_rev.training.launch import first_process, in_processes, refuse_launch

    refuse_launch()
    if dry_run:
        from rwkv_rev.training.finetune import plan

        planned = plan(settings, progress=not quiet, keep_cache=False)
        if first_process():
            _print_plan(planned, as_json)
        return
    from rwkv_rev.training.finetune import run

    try:
        with in_processes():
            result = run(settings, notify=out.note if first_process() else lambda text: None, quiet=quiet)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        from rwkv_rev.training.working_folder import what_is_kept

        tell(what_is_kept(settings))
        raise
    if not first_process():
        return
    if as_json:
        out.print_json(result.to_dict())
    elif quiet:
        out.print_path(result.output)
    else:
        _print_result(result)


def _print_plan(planned: Any, as_json: bool) -> None:
    values = planned.to_dict()
    if as_json:
        out.print_json(values)
        return
    unused = tuple(
        prefix
        for prefix, used in (
            ("lora_", values["settings"]["tune"] == "lora"),
            ("sample_", values["settings"]["sample_prompt"]),
            ("min_delta", values["settings"]["patience"]),
        )
        if not used
    )
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in values["settings"].items()
        if value not in (None, [], False) and not name.startswith(unused)
    }
    shown["objective"] = shown["objective"].replace(",", ", ")  # where lines may break
    out.print_fields("Settings", {**shown, "model is": values["model"], "processes": values["processes"]})
    data = values["data"]
    out.print_fields(
        "\nData",
        {
            "documents": f"{data['documents']:,}",
            "tokens": f"{data['tokens']:,}, of which {data['loss_tokens']:,} with loss "
            f"(shortest document {data['shortest']:,}, longest {data['longest']:,})",
            "rows": f"{data['rows']:,}",
            "padding": f"{100 * data['padding_share']:.1f} %",
        },
    )
    memory = values["memory"]
    freed = "; on the CPU up to 1.8 times that, its allocator keeps freed blocks"
    kept = freed if planned.device == "cpu" else ""
    out.print_fields(
        "\nForecast",
        {
            "steps": f"{values['steps']:,}",
            "tokens per step": f"{values['tokens_per_step']:,.0f}",
            "chunk length": f"{values['settings']['chunk_length']:,} ({values['chunk_length_is']})",
            "gradient": f"{memory['strategy']}, {memory['tokens_at_once']:,} tokens at once",
            **{
                name: out.human_bytes(memory[name]) for name in ("weights", "gradients", "optimizer", "graph")
            },
            "memory": f"{out.human_bytes(memory['device'])} of tensors {BEYOND}{kept}",
            **_recordings(memory),
            "tape": _tape(memory["tape"], memory),
            **(
                {"remnants": f"{values['remnants']} ({values['remnants_are']})"} if values["remnants"] else {}
            ),
        },
    )
    for text in data["notes"]:
        out.note(text)
    for text in values["notes"]:
        out.note(f"warning: {text}")


def _recordings(memory: dict[str, Any]) -> dict[str, str]:
    """What a GPU must have where recordings of launches are kept."""
    if not memory["recordings"]:
        return {}
    held, most = (out.human_bytes(memory[name]) for name in ("recordings", "reserved"))
    return {"with recordings": f"{most}; {held} of it are kept between steps"}


def _print_result(result: Any) -> None:
    held_out = result.held_out
    stopped = result.planned_steps is not None and result.steps < result.planned_steps
    fields: dict[str, object] = {
        _what(result): result.output,
        "tuned": f"{result.tune}, {result.trainable_parameters:,} of {result.parameters:,} parameters",
        "steps": f"{result.steps:,}" + (f" of {result.planned_steps:,}" if stopped else ""),
        "training loss": _losses(result),
    }
    if held_out is not None:
        fields["held-out"] = f"{held_out[0]:.4f} to {held_out[1]:.4f} bits per byte"
    if result.best_step is not None:
        worse = held_out is not None and held_out[1] >= held_out[0]
        but = ", but none was lower than before the first step" if worse else ""
        fields["kept"] = f"step {result.best_step:,}, the lowest held-out loss{but}"
    fields |= {
        "speed": f"{result.tokens_per_second:,.0f} tokens/s ({result.tokens:,} tokens, {result.seconds:,.0f} s)",
        "tape": _tape(result.tape_bytes),
        "memory": f"{out.human_bytes(result.memory_bytes)} {BEYOND} "
        f"({out.human_bytes(result.process_bytes)} of host memory with it)",
        "optimizer": out.human_bytes(result.optimizer_bytes),
        "log and curve": result.output / "training",
    }
    if result.samples is not None:
        fields["samples"] = result.samples
    if result.address:
        fields["uploaded to"] = result.address
    out.print_fields("Fine-tuned", fields)


def _what(result: Any) -> str:
    return "adapter" if result.adapter_only else "model"


def _tape(nbytes: int, planned: dict[str, Any] | None = None) -> str:
    """Bytes of the tape; why there are none, which looks like a fault."""
    if nbytes:
        return ("about " if planned and planned["tape_is_estimate"] else "") + out.human_bytes(nbytes)
    if planned and planned["strategy"] not in ("checkpoint", "reversible"):
        return f"none ({planned['strategy']} keeps no states)"
    return "0 B (only chunks between the first and the last of a row need a record; full has none)"


def _losses(result: Any) -> str:
    """The first and the last step's, with what they are not: a measure of progress."""
    last = f", {result.last_loss:.4f} in step {result.steps:,}" if result.steps > 1 else ""
    noise = "; --eval-data FILE measures progress" if result.held_out is None else ""
    other = ", of other rows" if last and not result.same_rows else ""
    return f"{result.first_loss:.4f} in step 1{last} (nats per token{other}{noise})"
