"""The workloads: true configurations of the models, the GEMM shapes that follow, and how weight scales are shared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from benchmarks.record import Json
from export.formats.operands import exact_multipliers
from export.models.description import LATENT_PIXELS

PIXELS = (256, 512, 1024)  # picture sizes that are measured; DiT-XL/2 was published up to 512


@dataclass(frozen=True)
class Gemm:
    """Y [M, N] = X [M, K] @ W [N, K].T, `count` times in one call of the denoiser."""

    name: str
    m: int
    n: int
    k: int
    count: int

    @property
    def flops(self) -> int:
        """Floating-point operations of all `count` calls."""
        return 2 * self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Workload:
    """One model at its published size. `config`: arguments of the diffusers class; `caption`: caption tokens."""

    name: str
    class_name: str
    config: Json = field(hash=False)
    caption: int = 0

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ValueError(f"{self.name}: width {self.width} is not a multiple of 8")

    @property
    def width(self) -> int:
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def tokens(self) -> int:
        """Image tokens at the configuration's own resolution."""
        return (self.config["sample_size"] // self.config["patch_size"]) ** 2

    @property
    def pixels(self) -> int:
        """Edge of the picture in pixels."""
        return self.config["sample_size"] * LATENT_PIXELS

    def changed(self, **changes: object) -> Workload:
        """The same model with fields of its configuration replaced; width-bound fields follow the width."""
        config = {**self.config, **changes}
        width = config["num_attention_heads"] * config["attention_head_dim"]
        bound = {"hidden_size": width} if "hidden_size" in config else {}
        if self.class_name == "PixArtTransformer2DModel":
            bound = {"cross_attention_dim": width}
        return Workload(self.name, self.class_name, {**config, **bound}, self.caption)

    def at(self, pixels: int) -> Workload:
        """The same model for pictures of `pixels` x `pixels`."""
        return self.changed(sample_size=pixels // LATENT_PIXELS)

    def gemms(self, batch: int = 1) -> list[Gemm]:
        """The quantized linears of one denoiser call at batch size `batch`."""
        c, layers, m = self.width, self.config["num_layers"], batch * self.tokens
        hidden = int(c * self.config.get("mlp_ratio", 4.0))
        rows = [
            Gemm("attn.qkv", m, 3 * c, c, layers),
            Gemm("attn.out", m, c, c, layers),
            Gemm("ff.in", m, hidden, c, layers),
            Gemm("ff.out", m, c, hidden, layers),
        ]
        if self.caption:
            read = self.config["cross_attention_dim"]
            rows += [Gemm("cross.q", m, c, c, layers), Gemm("cross.out", m, c, c, layers)]
            rows += [Gemm("cross.kv", batch * self.caption, 2 * c, read, layers)]
        if self.class_name == "HunyuanDiT2DModel":  # the later half of the blocks, the middle one excepted
            rows += [Gemm("skip", m, c, 2 * c, layers - layers // 2 - 1)]
        return rows


def _xl(**fields: object) -> Json:
    return {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "num_layers": 28,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        **fields,
    }


def _pixart(name: str, sample_size: int, caption: int, **fields: object) -> Workload:
    config = _xl(
        out_channels=8,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=sample_size,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=4096,
        **fields,
    )
    return Workload(name, "PixArtTransformer2DModel", config, caption)


DIT = _xl(
    out_channels=8,
    attention_bias=True,
    sample_size=32,
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_zero",
    norm_elementwise_affine=False,
    norm_eps=1e-5,
)
HUNYUAN = _xl(
    attention_head_dim=88,
    num_layers=40,
    sample_size=128,
    hidden_size=1408,
    mlp_ratio=4.3637,
    learn_sigma=True,
    norm_type="layer_norm",
    cross_attention_dim=1024,
    cross_attention_dim_t5=2048,
    pooled_projection_dim=1024,
    text_len=77,
    text_len_t5=256,
    use_style_cond_and_image_meta_size=True,
)

WORKLOADS: dict[str, Workload] = {
    row.name: row
    for row in (
        # 256 pixels, 256 tokens: the size of the CPU figures. 512 and 1024 pixels: sample_size 64 and 128.
        _pixart("pixart", 32, 120, use_additional_conditions=False),
        _pixart("pixart_sigma", 128, 300, use_additional_conditions=False, interpolation_scale=2),
        Workload("hunyuan", "HunyuanDiT2DModel", HUNYUAN, 77 + 256),
        Workload("dit", "DiTTransformer2DModel", DIT),
    )
}


@dataclass(frozen=True)
class Shape:
    """One GEMM to measure and every place it has: `users` are "model linear" of those that run it at `pixels`."""

    m: int
    n: int
    k: int
    pixels: int
    users: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def flops(self) -> int:
        """Floating-point operations of one call."""
        return 2 * self.m * self.n * self.k


# PixArt-Sigma has the GEMMs of PixArt-alpha, but for its longer caption.
MEASURED = ("pixart", "hunyuan", "dit")


def gemm_shapes() -> list[Shape]:
    """Every distinct GEMM of the quantized linears of MEASURED, one row each, the largest of PIXELS first.

    A GEMM that does not grow with the picture (cross.kv) has the row of the largest one.
    """
    places: dict[tuple[int, int, int], tuple[int, list[str]]] = {}
    for size in sorted(PIXELS, reverse=True):
        for model in MEASURED:
            for row in WORKLOADS[model].at(size).gemms():
                first, users = places.setdefault((row.m, row.n, row.k), (size, []))
                users += [f"{model} {row.name}"] if first == size else []
    return [Shape(*mnk, size, tuple(users)) for mnk, (size, users) in places.items()]


# --- how weight scales are shared -----------------------------------------------------------------------------------


class SharedScales(TypedDict, total=False):
    """The fields of GemmSpec that say how weight scales are shared."""

    group_size: int
    real_groups: bool
    multipliers: tuple[int, ...]


@dataclass(frozen=True)
class Granularity:
    """How weight scales are shared. group_size 0: a channel; real: a real scale a group, else an exact multiplier."""

    name: str
    group_size: int = 0
    real: bool = False

    def spec_fields(self, weight: str) -> SharedScales:
        """The fields of GemmSpec that say so."""
        if self.group_size == 0:
            return {}
        multipliers = (1,) if self.real else exact_multipliers(weight)
        return {"group_size": self.group_size, "real_groups": self.real, "multipliers": multipliers}


CHANNEL = Granularity("per channel")
EXACT_64 = Granularity("exact groups of 64", 64)
REAL_128 = Granularity("real groups of 128", 128, True)
