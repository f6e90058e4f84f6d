"""Primes, odd sizes and ones: what tiles do not divide."""

PROBLEMS = {
    "cpu": {
        "gemm": (
            "gemm[m=1,n=1021,k=509]",
            "gemm[m=509,n=1,k=1021]",
            "gemm[m=127,n=331,k=1]",
            "gemm[m=251,n=509,k=1021]",
            "gemm[m=397,n=401,k=409,transpose=nt,epilogue=bias_gelu]",
        ),
        "attention": (
            "attention[b=1,h=3,sq=251,d=64,causal]",
            "attention[b=1,h=6,hkv=3,sq=127,sk=509,d=64,causal]",
            "attention[b=3,h=5,sq=1,sk=1021,d=128]",
        ),
        "softmax": ("softmax[m=1,n=100003]", "softmax[m=1021,n=1021]", "softmax[m=100003,n=3]"),
        "layernorm": ("layernorm[m=1,n=100003]", "layernorm[m=1021,n=1021]", "layernorm[m=509,n=4099,rms]"),
    },
    "cuda": {
        "gemm": (
            "gemm[m=1,n=8191,k=4093]",
            "gemm[m=4093,n=1,k=8191]",
            "gemm[m=127,n=4093,k=1]",
            "gemm[m=1021,n=2039,k=4093]",
            "gemm[m=4093,n=4091,k=4099]",
            "gemm[m=3001,n=3011,k=3019,transpose=nt,epilogue=bias_gelu]",
        ),
        "attention": (
            "attention[b=3,h=7,sq=2039,d=64,causal]",
            "attention[b=2,h=6,hkv=3,sq=509,sk=4093,d=128,causal]",
            "attention[b=5,h=11,sq=1,sk=8191,d=128]",
        ),
        "softmax": ("softmax[m=1,n=1000003]", "softmax[m=8191,n=8191]", "softmax[m=1000003,n=3]"),
        "layernorm": ("layernorm[m=1,n=1000003]", "layernorm[m=8191,n=8191]", "layernorm[m=16381,n=4099,rms]"),
    },
}
