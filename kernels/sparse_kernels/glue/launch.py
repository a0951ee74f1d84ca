"""How the glue kernels are launched, per GPU architecture."""

from sparse_kernels.selection.launch import Scan

# "norm": a program per row; "glu": programs of so many elements, all rows of their channels counted.
LAUNCH = {
    90: {
        "norm": Scan(block=16384, warps=8),
        "glu": Scan(block=1024, warps=4),
    }
}
