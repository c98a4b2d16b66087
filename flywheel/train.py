"""Trains one LoRA adapter in a process of its own: `python -m flywheel.train RUN_DIR` reads a folder and fills it.

Input: RUN_DIR/request.json. Output: progress.json while it runs, adapter/ and, last, manifest.json.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Message = dict[str, Any]
# From messages, tools and whether to open the assistant's turn, to token ids.
Render = Callable[[list[Message], list[Any], bool], list[int]]


class TrainError(Exception):
    """The request cannot be trained on; the message says which file and line, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """How the adapter is trained. The defaults suit tiny models; one of a billion parameters learns at 1e-4 or so."""

    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    learning_rate: float = 4e-3
    epochs: int = 10
    batch_size: int = 16
    max_length: int = 1024
    warmup: float = 0.05
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What request.json says, with its paths made absolute."""

    base_model: str
    train: Path
    validation: Path
    adapter_name: str
    seed: int
    hyperparameters: Hyperparameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation as token ids; the first `prompt` of them are given, the rest is to be learnt."""

    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The rows of one file that fit, and the line numbers of those that are too long."""

    kept: tuple[Example, ...]
    too_long: tuple[int, ...]


def load_request(run_dir: Path) -> Request:
    """Reads and checks RUN_DIR/request.json; relative paths count from RUN_DIR."""
    path = run_dir / "request.json"
    raw = _json_object(path, _read(path))
    expected = {field.name: field.type for field in fields(Request)}
    if unknown := sorted(raw.keys() - expected.keys()):
        raise TrainError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(expected)}")
    for key in ("base_model", "train", "validation", "adapter_name"):
        if not isinstance(raw.get(key), str) or not raw[key]:
            raise TrainError(f"{path}: {key!r} must be a text that is not empty")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int):
        raise TrainError(f"{path}: 'seed' must be a whole number")
    return Request(
        base_model=raw["base_model"],
        train=run_dir / raw["train"],
        validation=run_dir / raw["validation"],
        adapter_name=raw["adapter_name"],
        seed=seed,
        hyperparameters=_hyperparameters(path, raw.get("hyperparameters", {})),
    )


def _hyperparameters(path: Path, raw: Any) -> Hyperparameters:
    if not isinstance(raw, dict):
        raise TrainError(f"{path}: 'hyperparameters' must be an object")
    known = {field.name: type(field.default) for field in fields(Hyperparameters)}
    for name, value in raw.items():
        if name not in known:
            raise TrainError(f"{path}: unknown hyperparameter {name!r}; known are {', '.join(known)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (known[name] is int and not isinstance(value, int)) or value < 0:
            raise TrainError(
                f"{path}: hyperparameter {name!r} must be a number of type {known[name].__name__}, not {value!r}"
            )
    parameters = Hyperparameters(**raw)
    for name in ("rank", "alpha", "epochs", "batch_size", "max_length", "learning_rate"):
        if getattr(parameters, name) <= 0:
            raise TrainError(f"{path}: hyperparameter {name!r} must be above 0")
    return parameters


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{path}: cannot be read ({error})") from error


def _json_object(where: object, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise TrainError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise TrainError(f"{where}: a JSON object is expected")
    return value


def for_template(messages: Sequence[Message], where: str) -> list[Message]:
    """The messages as chat templates want them: logs hold a call's arguments as JSON text, templates take objects."""
    return [
        {**message, "tool_calls": [_call_for_template(call, where) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _call_for_template(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            function["arguments"] = _json_object(where, function["arguments"] or "{}")
    except (KeyError, TypeError) as error:
        raise TrainError(f"{where}: a tool call needs function.name and function.arguments") from error
    return {**call, "function": function}


def load_examples(path: Path, render: Render, max_length: int, *, least: int = 1) -> Examples:
    """Reads rows, at least so many; each must end with what the assistant said."""
    kept: list[Example] = []
    too_long: list[int] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _json_object(where, line)
        messages = row.get("messages")
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise TrainError(f"{where}: 'messages' must be a list that ends with the assistant's message")
        example = _example(for_template(messages, where), row.get("tools") or [], render, where)
        if len(example.ids) > max_length:
            too_long.append(number)
        else:
            kept.append(example)
    if len(kept) < least:
        raise TrainError(f"{path}: no row of at most {max_length} tokens; add records or raise max_length")
    return Examples(kept=tuple(kept), too_long=tuple(too_long))


def _example(messages: list[Message], tools: list[Any], render: Render, where: str) -> Example:
    ids = render(messages, tools, False)
    prompt = render(messages[:-1], tools, True)
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        raise TrainError(
            f"{where}: the base model's chat template does not continue its own prompt; use another base model"
        )
    return Example(ids=tuple(ids), prompt=len(prompt))


def batches(examples: Sequence[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """All examples in batches of like length, so that little is padding; the batches' order is random."""
    order = sorted(examples, key=lambda example: (len(example.ids), rng.random()))
    cut = [list(order[at : at + size]) for at in range(0, len(order), size)]
    rng.shuffle(cut)
    return cut


def learning_rate_share(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step: a linear warm-up, then half a cosine down to nothing."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return (1 + math.cos(math.pi * (step - first) / max(1, steps - first))) / 2


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces the file in one step: a reader sees the old content or the new."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Waits until no other process trains in this folder. The lock goes with the process, however it ends."""
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def train(request: Request, run_dir: Path) -> dict[str, Any]:
    """Trains, writes RUN_DIR/adapter, and returns what the manifest is to say."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    wanted = request.hyperparameters
    torch.manual_seed(request.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(request.base_model)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        base = AutoModelForCausalLM.from_pretrained(request.base_model, dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        raise TrainError(f"base model {request.base_model}: cannot be loaded ({error})") from error
    if not tokenizer.chat_template:
        raise TrainError(f"base model {request.base_model}: its tokenizer has no chat template; use an instruct model")

    def render(messages: list[Message], tools: list[Any], open_turn: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=open_turn, tokenize=False
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    training = load_examples(request.train, render, wanted.max_length)
    validation = load_examples(request.validation, render, wanted.max_length, least=0)
    lora = LoraConfig(
        r=wanted.rank,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    losses = _fit(model, training.kept, validation.kept, request, run_dir)
    model.save_pretrained(run_dir / "adapter", safe_serialization=True)
    return {
        "adapter_name": request.adapter_name,
        "base_model": request.base_model,
        "hyperparameters": asdict(wanted),
        "seed": request.seed,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "records": {"train": len(training.kept), "validation": len(validation.kept)},
        "too_long_lines": {"train": list(training.too_long), "validation": list(validation.too_long)},
        "losses": losses,
        "device": device,
        "versions": _versions(),
        "sha256": _digests(run_dir / "adapter"),
        "seconds": round(time.monotonic() - started, 1),
    }


def _fit(
    model: Any, training: Sequence[Example], validation: Sequence[Example], request: Request, run_dir: Path
) -> list[dict[str, float | None]]:
    import torch

    wanted = request.hyperparameters
    rng = random.Random(request.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=wanted.learning_rate, weight_decay=wanted.weight_decay)
    steps = wanted.epochs * math.ceil(len(training) / wanted.batch_size)
    step = 0
    losses: list[dict[str, float | None]] = []
    for epoch in range(1, wanted.epochs + 1):
        model.train()
        total = 0.0
        for batch in batches(training, wanted.batch_size, rng):
            for group in optimizer.param_groups:
                group["lr"] = wanted.learning_rate * learning_rate_share(step, steps, wanted.warmup)
            loss = _loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            total += loss.item() * len(batch)
        val_loss = _validate(model, validation, wanted.batch_size) if validation else None
        losses.append({"loss": round(total / len(training), 4), "val_loss": val_loss})
        write_json(
            run_dir / "progress.json",
            {"epoch": epoch, "epochs": wanted.epochs, "step": step, "steps": steps, **losses[-1]},
        )
        sys.stdout.write(f"epoch {epoch}/{wanted.epochs} loss {losses[-1]['loss']} val_loss {val_loss}\n")
        sys.stdout.flush()
    return losses


def _validate(model: Any, validation: Sequence[Example], batch_size: int) -> float:
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in batches(validation, batch_size, random.Random(0)):
            total += float(_loss(model, batch)) * len(batch)
    return round(total / len(validation), 4)


def _loss(model: Any, batch: Sequence[Example]) -> Any:
    """The mean loss over the assistant's tokens. Padding is on the right, so its id does not matter."""
    import torch

    width = max(len(example.ids) for example in batch)
    inputs = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros_like(inputs)
    labels = torch.full_like(inputs, -100)
    for at, example in enumerate(batch):
        ids = torch.tensor(example.ids)
        inputs[at, : len(ids)] = ids
        mask[at, : len(ids)] = 1
        labels[at, example.prompt : len(ids)] = ids[example.prompt :]
    device = next(model.parameters()).device
    return model(input_ids=inputs.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: trained, or it had been already. 2: the request or its data cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m flywheel.train", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the folder with request.json")
    run_dir = parser.parse_args(argv).run_dir.resolve()
    try:
        if not run_dir.is_dir():
            raise TrainError(f"{run_dir}: no such folder")
        with exclusive(run_dir):
            manifest = run_dir / "manifest.json"
            # Another process may have finished the work while this one waited for the lock.
            if not manifest.exists():
                write_json(manifest, train(load_request(run_dir), run_dir))
    except TrainError as error:
        sys.stderr.write(f"train: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
