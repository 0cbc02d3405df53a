from collections.abc import Sequence
from typing import Any

_Operand = tuple[int, Sequence[int], object] | None

class Replaced:
    def __init__(self, entries: list[tuple[Any, Any, Any]]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

class EvalMode:
    def __init__(self, modules: list[Any]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

class OwnMode:
    def __init__(self, modules: list[Any]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

def release_other_threads() -> None: ...
def active_target() -> str: ...
def supported_targets() -> list[str]: ...
def select_target(name: str) -> None: ...
def set_thread_count(address: int) -> None: ...
def set_own_thread_count(threads: int) -> None: ...
def thread_source() -> str: ...
def refuse_workspace(n: int) -> None: ...
def release_workspaces() -> None: ...
def set_least_parallel_nanoseconds(nanoseconds: int) -> int: ...
def gram_f32(
    x: _Operand,
    x_element: int,
    y: _Operand,
    weight: _Operand,
    batch: Sequence[int],
    n: int,
    d: int,
    k: int,
    gram: int,
    cross: int,
) -> None: ...

gram_f64 = gram_f32

def moments_f32(
    x: _Operand,
    x_element: int,
    y: _Operand,
    weight: _Operand,
    n: int,
    d: int,
    k: int,
    center: bool,
    gram: int,
    cross: int,
    mean: int,
    weight_sum: int,
) -> None: ...

moments_f64 = moments_f32

def solve_normal_f32(
    x: _Operand,
    x_element: int,
    y: _Operand,
    weight: _Operand,
    ridge: _Operand,
    uniform_ridge: float,
    batch: Sequence[int],
    n: int,
    d: int,
    k: int,
    refine: int,
    jitter: float,
    solution: int,
    factor: int,
    info: int,
    rcond: int,
    jittered: int,
) -> None: ...

solve_normal_f64 = solve_normal_f32

def solve_segments_f32(
    x: _Operand,
    y: _Operand,
    offsets: int,
    indices: int,
    weight: _Operand,
    base: _Operand,
    ridge: _Operand,
    uniform_ridge: float,
    segments: int,
    entries: int,
    rows: int,
    d: int,
    k: int,
    solution: int,
    factor: int,
    info: int,
) -> None: ...

solve_segments_f64 = solve_segments_f32

def solve_normal_backward_f32(
    grad: _Operand,
    x: _Operand,
    y: _Operand,
    weight: _Operand,
    solution: _Operand,
    factor: _Operand,
    info: _Operand,
    batch: Sequence[int],
    n: int,
    d: int,
    k: int,
    grad_x: int,
    grad_y: int,
    grad_weight: int,
    grad_ridge: int,
) -> None: ...

solve_normal_backward_f64 = solve_normal_backward_f32

def solve_spd_f32(
    a: _Operand,
    b: _Operand,
    batch: Sequence[int],
    d: int,
    k: int,
    solution: int,
    factor: int,
    info: int,
) -> None: ...

solve_spd_f64 = solve_spd_f32

def cholesky_f32(
    a: _Operand,
    batch: Sequence[int],
    d: int,
    factor: int,
    info: int,
) -> None: ...

cholesky_f64 = cholesky_f32

def cholesky_solve_f32(
    factor: _Operand,
    b: _Operand,
    batch: Sequence[int],
    d: int,
    k: int,
    solution: int,
) -> None: ...

cholesky_solve_f64 = cholesky_solve_f32

def glm_point_f32(
    family: int,
    intercept: bool,
    x: _Operand,
    y: _Operand,
    labels: _Operand,
    weight: _Operand,
    w: _Operand,
    n: int,
    d: int,
    k: int,
    loss: int,
    gradient: int,
    curvature: int,
) -> None: ...

glm_point_f64 = glm_point_f32
glm_point_bf16 = glm_point_f32

def glm_product_f32(
    family: int,
    intercept: bool,
    x: _Operand,
    weight: _Operand,
    curvature: int,
    v: _Operand,
    m: int,
    n: int,
    d: int,
    k: int,
    product: int,
) -> None: ...

glm_product_f64 = glm_product_f32
glm_product_bf16 = glm_product_f32

def linear_cross_entropy_f32(
    input: _Operand,
    weight: _Operand,
    bias: _Operand,
    target: _Operand,
    row_weight: _Operand,
    rows: Sequence[int],
    d: int,
    v: int,
    ignore_index: int,
    label_smoothing: float,
    tangent: bool,
    gauss_newton: bool,
    input_tangent: _Operand,
    weight_tangent: _Operand,
    bias_tangent: _Operand,
    row_weight_tangent: _Operand,
    value: int,
    loss: int,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
) -> None: ...

linear_cross_entropy_f64 = linear_cross_entropy_f32
linear_cross_entropy_bf16 = linear_cross_entropy_f32

def inverse_cholesky_f32(
    a: _Operand,
    damping: _Operand,
    batch: Sequence[int],
    n: int,
    unit: bool,
    factor: int,
    info: int,
) -> None: ...

inverse_cholesky_f64 = inverse_cholesky_f32

def polar_f32(
    m: _Operand,
    batch: Sequence[int],
    rows: int,
    columns: int,
    steps: Sequence[tuple[float, float, float]],
    factor: int,
    info: int,
) -> None: ...
def compensated_sweep_f32(
    w: int,
    swept: int,
    factor: int,
    unit: bool,
    rows: int,
    columns: int,
    bits: int,
    symmetric: bool,
    group_size: int,
    group: int,
    groups: int,
    scale: int,
    zero: int,
    codes: int,
    sparsity: float,
    keep: int,
    of: int,
    error: int,
) -> None: ...

compensated_sweep_f64 = compensated_sweep_f32

def mlp_gradient_f32(
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    n: int,
    x: _Operand,
    y: _Operand,
    parameters: int,
    loss: int,
    gradient: int,
) -> None: ...

mlp_gradient_f64 = mlp_gradient_f32

def mlp_product_f32(
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    n: int,
    x: _Operand,
    parameters: int,
    v: int,
    product: int,
) -> None: ...

mlp_product_f64 = mlp_product_f32

def mlp_jacobian_f32(
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    n: int,
    x: _Operand,
    parameters: int,
    scale: float,
    jacobian: int,
) -> None: ...

mlp_jacobian_f64 = mlp_jacobian_f32

_AttentionInput = tuple[int, Sequence[int], int, object] | None

def attention_forward_f32(
    q: _AttentionInput,
    k: _AttentionInput,
    v: _AttentionInput,
    mask: _AttentionInput,
    out: _AttentionInput,
    lse: _AttentionInput,
    grad: _AttentionInput,
    grad_lse: _AttentionInput,
    q_tangent: _AttentionInput,
    k_tangent: _AttentionInput,
    v_tangent: _AttentionInput,
    mask_tangent: _AttentionInput,
    out_tangent: _AttentionInput,
    lse_tangent: _AttentionInput,
    grad_tangent: _AttentionInput,
    grad_lse_tangent: _AttentionInput,
    batch: Sequence[int],
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    d: int,
    dv: int,
    scale: float,
    causal: bool,
    to_out: int,
    to_lse: int,
) -> None: ...

attention_forward_f64 = attention_forward_f32
attention_jvp_f32 = attention_forward_f32
attention_jvp_f64 = attention_forward_f32

def attention_forward_and_jvp_f32(
    q: _AttentionInput,
    k: _AttentionInput,
    v: _AttentionInput,
    mask: _AttentionInput,
    out: _AttentionInput,
    lse: _AttentionInput,
    grad: _AttentionInput,
    grad_lse: _AttentionInput,
    q_tangent: _AttentionInput,
    k_tangent: _AttentionInput,
    v_tangent: _AttentionInput,
    mask_tangent: _AttentionInput,
    out_tangent: _AttentionInput,
    lse_tangent: _AttentionInput,
    grad_tangent: _AttentionInput,
    grad_lse_tangent: _AttentionInput,
    batch: Sequence[int],
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    d: int,
    dv: int,
    scale: float,
    causal: bool,
    to_out: int,
    to_lse: int,
    to_out_tangent: int,
    to_lse_tangent: int,
) -> None: ...

attention_forward_and_jvp_f64 = attention_forward_and_jvp_f32

def attention_backward_f32(
    q: _AttentionInput,
    k: _AttentionInput,
    v: _AttentionInput,
    mask: _AttentionInput,
    out: _AttentionInput,
    lse: _AttentionInput,
    grad: _AttentionInput,
    grad_lse: _AttentionInput,
    q_tangent: _AttentionInput,
    k_tangent: _AttentionInput,
    v_tangent: _AttentionInput,
    mask_tangent: _AttentionInput,
    out_tangent: _AttentionInput,
    lse_tangent: _AttentionInput,
    grad_tangent: _AttentionInput,
    grad_lse_tangent: _AttentionInput,
    batch: Sequence[int],
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    d: int,
    dv: int,
    scale: float,
    causal: bool,
    to_q_grad: int,
    to_k_grad: int,
    to_v_grad: int,
    to_mask_grad: _AttentionInput,
) -> None: ...

attention_backward_f64 = attention_backward_f32
attention_backward_jvp_f32 = attention_backward_f32
attention_backward_jvp_f64 = attention_backward_f32

def attention_backward_and_jvp_f32(
    q: _AttentionInput,
    k: _AttentionInput,
    v: _AttentionInput,
    mask: _AttentionInput,
    out: _AttentionInput,
    lse: _AttentionInput,
    grad: _AttentionInput,
    grad_lse: _AttentionInput,
    q_tangent: _AttentionInput,
    k_tangent: _AttentionInput,
    v_tangent: _AttentionInput,
    mask_tangent: _AttentionInput,
    out_tangent: _AttentionInput,
    lse_tangent: _AttentionInput,
    grad_tangent: _AttentionInput,
    grad_lse_tangent: _AttentionInput,
    batch: Sequence[int],
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    d: int,
    dv: int,
    scale: float,
    causal: bool,
    to_q_grad: int,
    to_k_grad: int,
    to_v_grad: int,
    to_mask_grad: _AttentionInput,
    to_q_grad_tangent: int,
    to_k_grad_tangent: int,
    to_v_grad_tangent: int,
    to_mask_grad_tangent: _AttentionInput,
) -> None: ...

attention_backward_and_jvp_f64 = attention_backward_and_jvp_f32

# csrc/sparse/bind.cpp

def sparse_multiply_f32(
    n: int,
    d: int,
    k: int,
    elements: int,
    offsets: int,
    indices: int,
    wide: bool,
    values: int,
    v: int,
    out: int,
) -> None: ...

sparse_multiply_f64 = sparse_multiply_f32
