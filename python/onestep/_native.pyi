from collections.abc import Sequence

_Operand = tuple[int, Sequence[int]] | None

def active_target() -> str: ...
def supported_targets() -> list[str]: ...
def select_target(name: str) -> None: ...
def set_parallel_for(address: int) -> None: ...
def thread_source() -> str: ...
def gram_f32(
    x: _Operand,
    y: _Operand,
    weight: _Operand,
    batch: Sequence[int],
    n: int,
    d: int,
    k: int,
    gram: int,
    cross: int,
    /,
) -> None: ...
def gram_f64(
    x: _Operand,
    y: _Operand,
    weight: _Operand,
    batch: Sequence[int],
    n: int,
    d: int,
    k: int,
    gram: int,
    cross: int,
    /,
) -> None: ...
def moments_f32(
    x: _Operand,
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
    /,
) -> None: ...
def moments_f64(
    x: _Operand,
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
    /,
) -> None: ...
def solve_normal_f32(
    x: _Operand,
    y: _Operand,
    weight: _Operand,
    ridge: _Operand,
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
    /,
) -> None: ...
def solve_normal_f64(
    x: _Operand,
    y: _Operand,
    weight: _Operand,
    ridge: _Operand,
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
    /,
) -> None: ...
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
    /,
) -> None: ...
def solve_normal_backward_f64(
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
    /,
) -> None: ...
def solve_spd_f32(
    a: _Operand,
    b: _Operand,
    batch: Sequence[int],
    d: int,
    k: int,
    solution: int,
    factor: int,
    info: int,
    /,
) -> None: ...
def solve_spd_f64(
    a: _Operand,
    b: _Operand,
    batch: Sequence[int],
    d: int,
    k: int,
    solution: int,
    factor: int,
    info: int,
    /,
) -> None: ...
def cholesky_f32(
    a: _Operand,
    batch: Sequence[int],
    d: int,
    factor: int,
    info: int,
    /,
) -> None: ...
def cholesky_f64(
    a: _Operand,
    batch: Sequence[int],
    d: int,
    factor: int,
    info: int,
    /,
) -> None: ...
def cholesky_solve_f32(
    factor: _Operand,
    b: _Operand,
    batch: Sequence[int],
    d: int,
    k: int,
    solution: int,
    /,
) -> None: ...
def cholesky_solve_f64(
    factor: _Operand,
    b: _Operand,
    batch: Sequence[int],
    d: int,
    k: int,
    solution: int,
    /,
) -> None: ...
