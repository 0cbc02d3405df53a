"""Products with a sparse matrix by rows (CSR): ``sparse_multiply``."""

from onestep.ops.sparse import cpu, derivatives
from onestep.ops.sparse.schema import sparse_multiply

__all__ = ["cpu", "derivatives", "sparse_multiply"]
