"""What ten minutes at a fresh device are for, most valuable first; `bench.py campaign` walks it in this order."""

PROBLEMS = {
    "cpu": {
        "gemm": ("gemm[m=512,n=512,k=512]",),
        "attention": ("attention[b=1,h=8,sq=512,d=64,causal]",),
        "softmax": ("softmax[m=4096,n=1024]",),
        "layernorm": ("layernorm[m=4096,n=1024]",),
    },
    "cuda": {
        "gemm": ("gemm[m=4096,n=4096,k=4096,transpose=nt]", "gemm[m=16,n=14336,k=4096,transpose=nt]"),
        "attention": (
            "attention[b=4,h=16,sq=4096,d=128,causal]",
            "attention[b=4,h=16,sq=4096,d=128]",
            "attention[b=16,h=32,sq=1024,d=64,causal]",
            "attention[b=16,h=32,hkv=8,sq=1,sk=8192,d=128]",
        ),
        "softmax": ("softmax[m=32768,n=4096]", "softmax[m=32768,n=32768]"),
        "layernorm": ("layernorm[m=32768,n=4096]", "layernorm[m=32768,n=4096,rms]"),
    },
}
