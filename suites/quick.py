"""Every operator at a friendly and at an awkward size: minutes on a CPU, seconds on a GPU."""

PROBLEMS = {
    "cpu": {  # at most some 10 ms a call on one AVX-512 core
        "gemm": ("gemm[m=512,n=512,k=512]", "gemm[m=8,n=2048,k=1024,transpose=nt]"),
        "attention": ("attention[b=1,h=8,sq=512,d=64,causal]", "attention[b=1,h=8,sq=512,d=64]"),
        "softmax": ("softmax[m=4096,n=1024]", "softmax[m=1024,n=8192]"),
        "layernorm": ("layernorm[m=4096,n=1024]", "layernorm[m=4096,n=1024,rms]"),
        "softmax_bwd": ("softmax_bwd[m=4096,n=1024]", "softmax_bwd[m=512,n=8192]"),
        "layernorm_bwd": ("layernorm_bwd[m=4096,n=1024]", "layernorm_bwd[m=4096,n=1024,rms]"),
        "attention_bwd": ("attention_bwd[b=1,h=8,sq=512,d=64,causal]", "attention_bwd[b=1,h=4,sq=512,d=64]"),
    },
    "cuda": {
        "gemm": (
            "gemm[m=4096,n=4096,k=4096]",
            "gemm[m=8192,n=8192,k=8192]",
            "gemm[m=4096,n=4096,k=4096,transpose=nt,epilogue=bias_gelu]",
            "gemm[m=16,n=14336,k=4096,transpose=nt]",
        ),
        "attention": (
            "attention[b=4,h=16,sq=4096,d=128,causal]",
            "attention[b=4,h=16,sq=4096,d=128]",
            "attention[b=16,h=32,sq=1024,d=64,causal]",
            "attention[b=16,h=32,hkv=8,sq=1,sk=8192,d=128]",
        ),
        "softmax": ("softmax[m=32768,n=4096]", "softmax[m=32768,n=32768]"),
        "layernorm": ("layernorm[m=32768,n=4096]", "layernorm[m=32768,n=4096,rms]", "layernorm[m=32768,n=16384,rms]"),
        "softmax_bwd": ("softmax_bwd[m=32768,n=4096]", "softmax_bwd[m=32768,n=32768]"),
        "layernorm_bwd": ("layernorm_bwd[m=32768,n=4096]", "layernorm_bwd[m=32768,n=4096,rms]"),
        "attention_bwd": (
            "attention_bwd[b=4,h=16,sq=4096,d=128,causal]",
            "attention_bwd[b=16,h=32,sq=1024,d=64,causal]",
        ),
    },
}
