"""The card of a pruned or recovered model, made from the record of where it comes from."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from slim_utils.common.loading import load_config, model_on_meta, write_text_atomic
from slim_utils.families import EXPORTED_FAMILIES, FAMILIES, SERVED_FAMILIES, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.output.provenance import (
    CARD_FILE,
    RECOVERY,
    copy_license_files,
    prunings,
    total_share_removed,
    write_provenance,
)
from slim_utils.profiling.model_stats import count_parameters
from slim_utils.profiling.tables import markdown_table

TEMPLATE = Path(__file__).with_name("model_card.md.j2")

Perplexities = list[dict[str, Any]] | dict[str, list[dict[str, Any]]] | None


def vllm_options(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Arguments of ``vllm.LLM`` that serve a small model of this configuration; ``None`` for families not tested there.

    vLLM's own Qwen2 knows no other heads than those that fill the hidden size, but its LLaMA has Qwen2's biases too.
    """
    if FAMILIES[config.model_type].base_type not in SERVED_FAMILIES:
        return None
    if config.model_type not in SERVED_FAMILIES:
        return {"model_impl": "transformers", "trust_remote_code": True}
    shape = layer_shapes(config)[0]
    if config.model_type == "qwen2" and shape.num_heads * shape.head_dim != config.hidden_size:
        return {"hf_overrides": {"architectures": ["LlamaForCausalLM"], "qkv_bias": True}}
    return {}


def model_card(
    provenance: dict[str, Any],
    config: PreTrainedConfig,
    parameters: int,
    masks: list[LayerMask] | None = None,
    perplexity: Perplexities = None,
    address: str = "DIR",
) -> str:
    """Text of the card of a pruned or recovered model.

    Args:
        provenance: of :func:`~slim_utils.output.provenance.read_provenance`, with the steps of this run.
        config: the model's.
        parameters: its size.
        masks: what each layer keeps, where that is not the shape of ``config``.
        perplexity: measured at the end of this run, or ``before`` and ``after`` it; ``None`` says that none was.
        address: what the commands call the model.
    """
    base, steps = provenance["base"], provenance["steps"]
    removals, trained = len(prunings(provenance)), any(step["kind"] == RECOVERY for step in steps)
    base_type = FAMILIES[config.model_type].base_type
    stock, options = base_type == config.model_type, vllm_options(config)
    total = ("parameters", f"{base['parameters']:,}", f"{parameters:,}")
    title = f"{base['name'].rsplit('/', 1)[-1]}, {' and '.join(['pruned'] * bool(removals) + ['fine-tuned'] * trained)}"
    card = ModelCard.from_template(
        _card_data(provenance, title, perplexity),
        template_path=str(TEMPLATE),
        title=title,
        name=base["name"],
        prunings=removals,
        share=f"{100 * total_share_removed(provenance):.1f}" if removals else "",
        trained=trained,
        total_table=markdown_table(("", "base", "pruned" if removals else "this model"), [total]),
        layer_table=_layer_table(base["layers"], _kept(config, masks)),
        steps=[(step["kind"].capitalize(), markdown_table(("", ""), step["settings"].items())) for step in steps],
        perplexity_table=_perplexity_table(perplexity),
        address=address,
        stock=stock,
        loses_kv_heads=not stock and _loses_kv_heads(config),
        vllm_flags=None if options is None else _vllm_flags(options),
        exported=base_type in EXPORTED_FAMILIES,
        license_text=base["card"].get("license_name") or base["card"].get("license"),
    )
    return f"{card}\n"


def _card_data(provenance: dict[str, Any], title: str, perplexity: Perplexities) -> ModelCardData:
    """What a hub reads of the card: the base with its licence and language, the texts, and the last perplexities."""
    base, steps = provenance["base"], provenance["steps"]
    last = perplexity.get("after", []) if isinstance(perplexity, dict) else perplexity or []
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=entry["dataset"],
            dataset_name=entry["dataset"],
            metric_type="perplexity",
            metric_value=round(entry["perplexity"], 4),
            metric_name=f"perplexity, windows of {entry['seqlen']} tokens{', BOS first' if entry['bos'] else ''}",
        )
        for entry in last
        if math.isfinite(entry["perplexity"])
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimgpt", *(["pruned", "structured-pruning"] if prunings(provenance) else [])],
        base_model=base["name"] if base["on_hub"] else None,
        datasets=sorted({name for step in steps for name in step["datasets"]}) or None,
        model_name=title if results else None,
        eval_results=results or None,
        **base["card"],
    )


def write_card(folder: Path, provenance: dict[str, Any], model_path: str, **options: Any) -> None:
    """Write the record, the card and the licence files beside the weights in ``folder``.

    Args:
        folder: of a checkpoint.
        provenance: with the steps of this run.
        model_path: what the run started from, whose licence files are copied.
        options: of :func:`model_card`.
    """
    config = load_config(str(folder), trust_remote_code=False)
    parameters = count_parameters(model_on_meta(config))
    write_provenance(folder, provenance)
    copy_license_files(model_path, folder)
    write_text_atomic(folder / CARD_FILE, model_card(provenance, config, parameters, **options))


def _kept(config: PreTrainedConfig, masks: list[LayerMask] | None) -> list[tuple[int, int, int, int]]:
    """Heads, kv heads, FFN width and experts of every layer."""
    if masks:
        return [
            (len(mask.kept_heads), len(mask.kept_kv_heads), mask.kept_width, mask.shape.num_experts) for mask in masks
        ]
    shapes = layer_shapes(config)
    return [(shape.num_heads, shape.num_kv_heads, shape.ffn_width, shape.num_experts) for shape in shapes]


def _layer_table(dense: list[list[int]], kept: list[tuple[int, int, int, int]]) -> str:
    """What every layer keeps of its heads, kv heads and FFN width."""
    rows = []
    for index, (layer, counts) in enumerate(zip(kept, dense, strict=True)):
        heads, groups, columns = (f"{now} of {before}" for now, before in zip(layer[:3], counts, strict=True))
        experts = f" (each of {layer[3]} experts)" if layer[3] else ""
        rows.append((index, heads, groups, columns + experts))
    return markdown_table(("layer", "heads", "key/value heads", "FFN columns"), rows)


def pruning_settings(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a card says of a pruning run.

    Args:
        record: content of its ``run.json``.
    """
    arguments, calibration = record["arguments"], record["calibration"]
    samples = f"{calibration['num_samples']} × {calibration['seqlen']} tokens, seed {record['seed']}"
    ratio = f"{arguments['sparsity']:g}"
    if arguments["non_uniform"]:
        strategy = arguments["non_uniform_strategy"]
        ratio = f"{arguments['min_sparsity']:g} to {arguments['max_sparsity']:g} ({strategy})"
    if arguments["target_ratio"]:
        ratio = f"{arguments['target_ratio']:g} of the block weights ({_allocation(arguments)})"
    elif arguments["target_params"]:
        ratio = f"down to {arguments['target_params']:,.0f} parameters ({_allocation(arguments)})"
    elif arguments["profile"]:
        ratio = f"those of {Path(arguments['profile']).name}"
    return [
        ("pruning ratio", ratio),
        ("compensation", "no" if arguments["no_compensate"] else "yes"),
        ("unit in grouped-query attention", arguments["gqa_unit"]),
        ("score of heads", "exact error" if arguments["exact_heads"] else "grouped Cholesky"),
        ("FFN columns of a step", arguments["column_group"] or "dynamic group size"),
        ("beginnings of text besides the samples", arguments["text_starts"] or 0),
        ("damping", f"{arguments['percdamp']:g}"),
        ("calibration text", " + ".join(Path(source["name"]).name for source in calibration["sources"])),
        ("first token of a sample", "BOS" if calibration["bos"] else "text"),
        ("calibration samples", samples),
        ("their fingerprint (sha256)", calibration["samples_sha256"]),
        ("versions", version_list(record)),
    ]


def version_list(record: dict[str, Any]) -> str:
    """The versions of a run on one line."""
    return ", ".join(f"{package} {version}" for package, version in record["versions"].items())


def _allocation(arguments: dict[str, Any]) -> str:
    rounds = arguments["refine"]
    return f"{arguments['allocation'] or 'uniform'}{f', refined {rounds} ×' if rounds else ''}"


def _perplexity_table(measured: Perplexities) -> str:
    """A line for each text and window length; empty where none was measured."""
    columns = measured if isinstance(measured, dict) else {"perplexity": measured or []}
    lists = list(columns.values())
    if not lists[0]:
        return ""
    rows = [
        (
            *(entries[0]["dataset"], entries[0]["seqlen"], "BOS" if entries[0]["bos"] else "text"),
            *(f"{entry['perplexity']:.2f}" for entry in entries),
        )
        for entries in zip(*lists, strict=True)
    ]
    return markdown_table(("text", "tokens of a window", "the first of them", *columns), rows)


def _loses_kv_heads(config: PreTrainedConfig) -> bool:
    """Whether a layer has fewer key/value heads than the configuration says at its top level."""
    whole = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return any(shape.num_kv_heads != whole for shape in layer_shapes(config))


def _vllm_flags(options: dict[str, Any]) -> str:
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(value if isinstance(value, str) else shlex.quote(json.dumps(value)))
    return "".join(f" {word}" for word in words)
