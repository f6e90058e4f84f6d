"""Softmax, layer norm and RMS norm, forward and backward, over rows of 256 to 262144: QuACK's (m, n) list.

On a CPU m is cut so that a matrix holds at most 4 Mi values, more than an L2 but tens of milliseconds at most.
"""

PROBLEMS = {
    "cpu": {
        "softmax": (
            "softmax[m=16384,n=256]",
            "softmax[m=4096,n=1024]",
            "softmax[m=1024,n=4096]",
            "softmax[m=256,n=16384]",
            "softmax[m=64,n=65536]",
            "softmax[m=16,n=262144]",
        ),
        "layernorm": (
            "layernorm[m=16384,n=256]",
            "layernorm[m=4096,n=1024]",
            "layernorm[m=1024,n=4096]",
            "layernorm[m=256,n=16384]",
            "layernorm[m=16384,n=256,rms]",
            "layernorm[m=4096,n=1024,rms]",
            "layernorm[m=1024,n=4096,rms]",
            "layernorm[m=16,n=262144,rms]",
        ),
        "softmax_bwd": (
            "softmax_bwd[m=16384,n=256]",
            "softmax_bwd[m=4096,n=1024]",
            "softmax_bwd[m=64,n=65536]",
        ),
        "layernorm_bwd": (
            "layernorm_bwd[m=16384,n=256]",
            "layernorm_bwd[m=4096,n=1024]",
            "layernorm_bwd[m=1024,n=4096,rms]",
        ),
    },
    "cuda": {
        "softmax": (
            "softmax[m=32768,n=256]",
            "softmax[m=32768,n=512]",
            "softmax[m=32768,n=1024]",
            "softmax[m=32768,n=2048]",
            "softmax[m=32768,n=4096]",
            "softmax[m=32768,n=8192]",
            "softmax[m=32768,n=16384]",
            "softmax[m=32768,n=32768]",
            "softmax[m=32768,n=65536]",
            "softmax[m=16384,n=131072]",
            "softmax[m=8192,n=262144]",
        ),
        "layernorm": (
            "layernorm[m=32768,n=256]",
            "layernorm[m=32768,n=512]",
            "layernorm[m=32768,n=1024]",
            "layernorm[m=32768,n=2048]",
            "layernorm[m=32768,n=4096]",
            "layernorm[m=32768,n=8192]",
            "layernorm[m=32768,n=16384]",
            "layernorm[m=32768,n=32768]",
            "layernorm[m=32768,n=65536]",
            "layernorm[m=32768,n=256,rms]",
            "layernorm[m=32768,n=512,rms]",
            "layernorm[m=32768,n=1024,rms]",
            "layernorm[m=32768,n=2048,rms]",
            "layernorm[m=32768,n=4096,rms]",
            "layernorm[m=32768,n=8192,rms]",
            "layernorm[m=32768,n=16384,rms]",
            "layernorm[m=32768,n=32768,rms]",
            "layernorm[m=32768,n=65536,rms]",
            "layernorm[m=16384,n=131072,rms]",
            "layernorm[m=8192,n=262144,rms]",
        ),
        "softmax_bwd": (
            "softmax_bwd[m=32768,n=256]",
            "softmax_bwd[m=32768,n=1024]",
            "softmax_bwd[m=32768,n=4096]",
            "softmax_bwd[m=32768,n=16384]",
            "softmax_bwd[m=32768,n=65536]",
        ),
        "layernorm_bwd": (
            "layernorm_bwd[m=32768,n=256]",
            "layernorm_bwd[m=32768,n=1024]",
            "layernorm_bwd[m=32768,n=4096]",
            "layernorm_bwd[m=32768,n=16384]",
            "layernorm_bwd[m=32768,n=4096,rms]",
            "layernorm_bwd[m=32768,n=8192,rms]",
        ),
    },
}
