"""What the Numba kernels are measured by on a CPU: one thread against torch, friendly, ragged and few-row shapes.

The shapes are those of the goals (ratios to torch; `--threads 1 --clock cpu`): products of 512 to 2048, the
attention of a small encoder and of two decoders, rows inside the caches and beyond the last level. The goals come
from prototypes on a Zen 5 core with AVX-512; where torch is near the roof of another CPU, the report says that a
goal lies above it.
"""

GOALS = {
    "gemm": {"fp32": 1.0, "bf16": 0.85, "int8": 1.0},
    "gemm[m=512,n=512,k=512]": {"fp32": 1.4},
    "gemm[m=1024,n=1024,k=1024]": {"fp32": 1.4},
    "gemm[m=2048,n=2048,k=2048]": {"fp32": 1.4},
    "attention": {"fp32": 1.7, "bf16": 1.7},
    "attention[b=1,h=12,sq=512,d=64,causal]": {"fp32": 2.2},
    "attention[b=1,h=8,sq=2048,d=64,causal]": {"fp32": 2.2},
    "attention[b=1,h=8,sq=1024,d=128,causal]": {"fp32": 2.2},
    "attention[b=1,h=8,hkv=2,sq=67,sk=331,d=80,causal]": {"fp32": 2.2},
    "softmax": {"fp32": 1.25, "bf16": 1.25},
    "softmax[m=4096,n=256]": {"fp32": 2.0, "bf16": 2.0},  # in the cache
    "layernorm": {"fp32": 1.2, "bf16": 1.2},
    "layernorm[m=2048,n=4096]": {"fp32": 5.0},  # 64 MiB, beyond the last-level cache
    "layernorm[m=16384,n=4096]": {"fp32": 5.0, "bf16": 5.0},
}

PROBLEMS = {
    "cpu": {
        "gemm": (
            "gemm[m=512,n=512,k=512]",
            "gemm[m=1024,n=1024,k=1024]",
            "gemm[m=2048,n=2048,k=2048]",
            "gemm[m=509,n=1021,k=767]",
            "gemm[m=1000,n=300,k=1111,transpose=nt]",
            "gemm[m=1,n=4096,k=4096,transpose=nt]",
            "gemm[m=8,n=2048,k=1024,transpose=nt]",
            "gemm[m=16,n=2048,k=1024]",
        ),
        "attention": (
            "attention[b=1,h=12,sq=512,d=64]",
            "attention[b=1,h=12,sq=512,d=64,causal]",
            "attention[b=1,h=8,sq=2048,d=64]",
            "attention[b=1,h=8,sq=2048,d=64,causal]",
            "attention[b=1,h=8,sq=1024,d=128]",
            "attention[b=1,h=8,sq=1024,d=128,causal]",
            "attention[b=1,h=8,hkv=2,sq=67,sk=331,d=80,causal]",
        ),
        "softmax": (
            "softmax[m=4096,n=256]",
            "softmax[m=4096,n=1024]",
            "softmax[m=2048,n=4096]",
            "softmax[m=16384,n=4096]",
            "softmax[m=1021,n=4099]",
        ),
        "layernorm": (
            "layernorm[m=4096,n=256]",
            "layernorm[m=4096,n=1024]",
            "layernorm[m=2048,n=4096]",
            "layernorm[m=16384,n=4096]",
            "layernorm[m=1021,n=4099]",
            "layernorm[m=4096,n=256,rms]",
        ),
    },
}
