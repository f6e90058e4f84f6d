"""What the Numba kernels are measured by on a CPU: one thread against torch, friendly, ragged and few-row shapes.

The shapes are those of the goals (ratios to torch; `--threads 1 --clock cpu`): products of 512 to 2048, the
attention of a small encoder and of two decoders, rows inside the caches and beyond the last level.
"""

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
