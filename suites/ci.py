"""One problem an operator, with the smallest sizes that say something: two minutes in a CI job."""

PROBLEMS = {
    "cpu": {
        "gemm": ("gemm[m=256,n=256,k=256]",),
        "attention": ("attention[b=1,h=4,sq=256,d=64,causal]",),
        "softmax": ("softmax[m=1024,n=1024]",),
        "layernorm": ("layernorm[m=1024,n=1024]",),
    },
    "cuda": {
        "gemm": ("gemm[m=4096,n=4096,k=4096]",),
        "attention": ("attention[b=4,h=16,sq=2048,d=128,causal]",),
        "softmax": ("softmax[m=32768,n=4096]",),
        "layernorm": ("layernorm[m=32768,n=4096]",),
    },
}
