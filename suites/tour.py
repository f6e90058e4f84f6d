"""One problem an operator: what `tour` races, in both default precisions."""

PROBLEMS = {
    "cpu": {
        "gemm": ("gemm[m=512,n=512,k=512]",),
        "attention": ("attention[b=1,h=8,sq=512,d=64,causal]",),
        "softmax": ("softmax[m=4096,n=1024]",),
        "layernorm": ("layernorm[m=4096,n=1024]",),
    },
    "cuda": {
        "gemm": ("gemm[m=8192,n=8192,k=8192]",),
        "attention": ("attention[b=4,h=16,sq=4096,d=128,causal]",),
        "softmax": ("softmax[m=32768,n=4096]",),
        "layernorm": ("layernorm[m=32768,n=4096]",),
    },
}
