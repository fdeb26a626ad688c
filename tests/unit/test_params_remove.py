"""Masked and pruned models: equal logits, sizes, saving and fine-tuning."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from slim_utils.common.errors import UserError
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import kept_indices, shrink, zero_removed
from slim_utils.profiling.model_stats import model_stats, removed_share
from tests.processes import run_python
from tests.tiny_models import ALL_TINY, TINY_VARIANTS, make_tiny, set_attention

# Families whose q/k norms or routers compute in fp32 for any dtype; sums with and without zeros differ by rounding.
FP32_INSIDE = ("olmo2", "mixtral", "qwen3_moe", "bloom")


def some_masks(model) -> list[LayerMask]:
    """Masks that keep other units in every layer, including head counts that do not divide the hidden size."""
    masks = []
    for index, shape in enumerate(layer_shapes(model.config)):
        groups = [group for group in range(shape.num_kv_heads) if index == 0 or group != index % shape.num_kv_heads]
        columns = []
        for column in range(shape.num_columns):
            ffn, position = divmod(column, shape.ffn_width)
            # The same number of every expert, but not the same columns.
            if index == 0 or (position if ffn % 2 else shape.ffn_width - 1 - position) % (index + 1):
                columns.append(column)
        masks.append(LayerMask.from_groups(shape, groups, columns))
    return masks


def masked_and_pruned(variant: str, dtype: torch.dtype):
    """The masked and the pruned model of ``some_masks``, and the masks."""
    model = make_tiny(variant, dtype)
    family, masks = find_family(model.config), some_masks(model)
    pruned = shrink(model, family, masks)
    zero_removed(model, family, masks)
    return model, pruned, masks


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ALL_TINY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_shrink_logits_equal_the_masked_models(variant, dtype, tolerance, implementation, samples):
    masked, pruned, _ = masked_and_pruned(variant, dtype)
    set_attention(masked, implementation)
    set_attention(pruned, implementation)
    with torch.no_grad():
        expected, actual = masked(samples).logits, pruned(samples).logits
    assert actual.dtype == dtype
    if variant in FP32_INSIDE:
        tolerance = max(tolerance, 1e-6)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_zero_removed_columns_alone_give_the_same_logits(samples):
    model = make_tiny("biases", torch.float64)
    family, masks = find_family(model.config), some_masks(model)
    masked = make_tiny("biases", torch.float64)
    zero_removed(masked, family, masks)
    with torch.no_grad():
        for layer, mask in zip(family.decoder_layers(model), masks, strict=True):
            for name, (dim, kept) in kept_indices(family, mask).items():
                if dim == 1:
                    weight = layer.get_parameter(name)
                    removed = [i for i in range(weight.shape[1]) if i not in kept.tolist()]
                    weight[:, removed] = 0
        assert torch.allclose(model(samples).logits, masked(samples).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ALL_TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shrink_saved_and_reloaded_is_the_same_model(variant, dtype, samples, tmp_path):
    _, pruned, masks = masked_and_pruned(variant, dtype)
    pruned.save_pretrained(tmp_path)
    # The grouped matrix products of transformers need expert widths that are multiples of 8.
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(again(samples).logits, pruned(samples).logits)
    assert again.config.layer_head_num == [len(mask.kept_heads) for mask in masks]
    assert again.config.layer_inter_size == [len(mask.kept_columns) // mask.shape.num_ffns for mask in masks]
    assert set(again.config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == pruned.config.tie_word_embeddings
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("variant", ALL_TINY)
def test_shrink_generates_the_same_with_and_without_cache(samples, variant):
    _, pruned, _ = masked_and_pruned(variant, torch.float32)
    prompt = samples[:2, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    assert torch.equal(pruned.generate(prompt, **options), pruned.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("variant", ALL_TINY)
def test_shrink_with_lora_trains_and_fuses(samples, variant):
    _, pruned, _ = masked_and_pruned(variant, torch.float32)
    adapted = get_peft_model(pruned, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted(input_ids=samples, labels=samples).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = adapted(input_ids=samples).logits
        fused = adapted.merge_and_unload()
        assert (fused(samples).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_shrink_of_a_pruned_model(samples):
    _, pruned, masks = masked_and_pruned("gqa", torch.float64)
    family, shapes = find_family(pruned.config), layer_shapes(pruned.config)
    assert [shape.num_heads for shape in shapes] == [len(mask.kept_heads) for mask in masks]
    again = [LayerMask.from_groups(shape, [0], list(range(0, shape.num_columns, 2))) for shape in shapes]
    pruned_again = shrink(pruned, family, again)
    zero_removed(pruned, family, again)
    assert pruned_again.config.layer_inter_size == [len(mask.kept_columns) for mask in again]
    with torch.no_grad():
        assert torch.allclose(pruned_again(samples).logits, pruned(samples).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["gqa", "biases", "qwen3", "gemma2", "phi3", "olmo2", "mixtral"])
def test_shrink_query_heads_keep_their_key_value_head(variant, samples, tmp_path):
    model = make_tiny(variant, torch.float64)
    family = find_family(model.config)
    masks = []
    for index, shape in enumerate(layer_shapes(model.config)):
        size = shape.heads_per_group
        removed = [group * size + (group + index) % size for group in range(shape.num_kv_heads)] if index else []
        heads = [head for head in range(shape.num_heads) if head not in removed]
        masks.append(LayerMask.from_heads(shape, heads, list(range(shape.num_columns))))
        assert masks[-1].kept_kv_heads == list(range(shape.num_kv_heads))
    pruned = shrink(model, family, masks)
    zero_removed(model, family, masks)
    pruned.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(samples).logits
        for actual in (pruned, AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")):
            assert (actual(samples).logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert pruned.config.layer_head_num == [6, *[6 - model.config.num_key_value_heads] * 3]


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_experts_implementation_can_be_set(variant):
    """The class of the pruned model is queried before the stock class, in a new process."""
    script = (
        "import sys; from models.families import FAMILIES; name = sys.argv[1]\n"
        "slim = FAMILIES[name].slim_model; assert slim._can_set_experts_implementation()\n"
        "stock = next(parent for parent in slim.__mro__ if parent.__module__.startswith('transformers.'))\n"
        "assert stock._can_set_experts_implementation()"
    )
    process = run_python("-c", script, variant)
    assert process.returncode == 0, process.stderr


def test_from_heads_different_numbers_per_kv_head_are_refused():
    shape = layer_shapes(make_tiny("gqa").config)[0]
    assert LayerMask.from_heads(shape, [3, 4, 5], [0]) == LayerMask.from_groups(shape, [1], [0])
    assert LayerMask.from_heads(shape, [1, 2, 3, 5], [0]).kept_kv_heads == [0, 1]
    with pytest.raises(ValueError, match="different numbers of query heads"):
        LayerMask.from_heads(shape, [1, 3, 5], [0])


@pytest.mark.parametrize("variant", ALL_TINY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shrink_uniform_shapes_makes_a_stock_model(variant, dtype, samples, tmp_path):
    model = make_tiny(variant, dtype)
    family, masks = find_family(model.config), []
    for index, shape in enumerate(layer_shapes(model.config)):
        # One of two, three or six groups is removed, another one in each layer.
        groups = [group for group in range(shape.num_kv_heads) if group != index % shape.num_kv_heads]
        masks.append(LayerMask.from_groups(shape, groups, [c for c in range(shape.num_columns) if c % 4 != index]))
    heads = len(masks[0].kept_heads)
    divides = 24 % heads == 0
    if (not divides and (variant in ("gemma2", "gemma3_text") or variant == "biases")) or family.heads_fill_hidden:
        with pytest.raises(UserError, match=f"--uniform_shapes: .* cannot have {heads} heads with a hidden size of 24"):
            shrink(model, family, masks, uniform_shapes=True)
        return
    pruned = shrink(model, family, masks, uniform_shapes=True)
    zero_removed(model, family, masks)
    pruned.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    # The grouped matrix products of transformers do not support these expert widths.
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    stock = "mistral" if variant in TINY_VARIANTS and not divides else model.config.model_type
    assert again.config.model_type == stock
    assert type(again).__module__.startswith(f"transformers.models.{stock.removesuffix('_text')}.")
    with torch.no_grad():
        expected = model(samples).logits
        # The q/k norms of OLMo have another epsilon in a stock model.
        tolerance = 1e-4 if dtype == torch.float32 or variant in FP32_INSIDE else 1e-9
        assert (pruned(samples).logits - expected).abs().max() <= tolerance * expected.abs().max()
        assert (again(samples).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    prompt = samples[:2, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    assert torch.equal(again.generate(prompt, **options), again.generate(prompt, use_cache=False, **options))


def test_shrink_uniform_shapes_of_different_layers_is_refused():
    model = make_tiny("gqa")
    with pytest.raises(UserError, match="--uniform_shapes: the pruned layers differ in shape"):
        shrink(model, find_family(model.config), some_masks(model), uniform_shapes=True)


def test_shrink_masks_of_other_shapes_are_refused():
    model = make_tiny("gqa")
    with pytest.raises(ValueError, match="layer shapes of the masks differ"):
        shrink(model, find_family(model.config), some_masks(make_tiny("mha")))


@pytest.mark.parametrize("variant", ALL_TINY)
def test_sizes_agree_with_closed_formulas(variant):
    model = make_tiny(variant)
    family, masks = find_family(model.config), some_masks(model)
    pruned = shrink(model, family, masks)
    config, seq_len, head_dim = model.config, 10, layer_shapes(model.config)[0].head_dim
    block_total = block_kept = attention = used = 0
    for mask in masks:
        shape = mask.shape
        # A token is routed to two of four experts.
        active = 0.5 if shape.num_experts else 1
        router = 4 * config.hidden_size if shape.num_experts else 0
        per_head = per_kv = 2 * config.hidden_size * head_dim
        per_column = (1 + sum(len(kinds) for _, kinds in family.mlp_rows)) * config.hidden_size
        block_total += shape.num_heads * per_head + shape.num_kv_heads * per_kv + shape.num_columns * per_column
        heads = len(mask.kept_heads) * per_head + len(mask.kept_kv_heads) * per_kv
        block_kept += heads + len(mask.kept_columns) * per_column
        used += heads + len(mask.kept_columns) * per_column * active + router
        attention += 2 * len(mask.kept_heads) * head_dim * seq_len**2
    assert removed_share(family.decoder_layers(model), family, masks) == pytest.approx(1 - block_kept / block_total)
    logits = config.hidden_size * config.vocab_size
    stats = model_stats(pruned.config, seq_len)
    assert stats.macs == (used + logits) * seq_len + attention
    state = sum(parameter.numel() for parameter in {id(p): p for p in pruned.parameters()}.values())
    assert stats.parameters == state
    assert stats.weight_bytes == 4 * state
    assert stats.kv_cache_bytes == 4 * 2 * head_dim * sum(len(mask.kept_kv_heads) for mask in masks)
    for layer, mask, module in zip(stats.layers, masks, family.decoder_layers(pruned), strict=True):
        heads, kv_heads, columns = len(mask.kept_heads), len(mask.kept_kv_heads), len(mask.kept_columns)
        active, router = (0.5, 4 * config.hidden_size) if mask.shape.num_experts else (1, 0)
        matrices = heads * per_head + kv_heads * per_kv + columns * per_column + router
        macs = (matrices - columns * per_column * (1 - active)) * seq_len
        assert layer.macs == macs + 2 * heads * head_dim * seq_len**2
        assert (layer.shape.num_heads, layer.shape.num_kv_heads, layer.shape.num_columns) == (heads, kv_heads, columns)
        named = {name: p.numel() for name, p in module.named_parameters()}
        of_norms = {name for name in named if "norm" in name or name.startswith("ln_")}
        biases = sum(named[name] for name in named if name.endswith("bias") and name not in of_norms)
        norms = sum(named[name] for name in of_norms)
        assert norms % head_dim == 0 and norms >= 2 * config.hidden_size
        assert layer.parameters == matrices + norms + biases
