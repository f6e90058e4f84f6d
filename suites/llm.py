"""The products, attentions and norms of Llama-3, BERT and GPT-2, in decode and in prefill.

Linear layers are stored as torch stores them ([n, k], transpose=nt), (n, k) as in the models' own
configurations: Llama-3 8B q+k+v (6144, 4096), output (4096, 4096), gate+up (28672, 4096), down
(4096, 14336); 70B split over eight devices (1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584);
BERT-base and GPT-2 (2304, 768), (768, 768), (3072, 768), (768, 3072). Decode is m = 1 to 64 tokens.
The CPU's list holds the small models whole and Llama-3 8B with all widths divided by four.
"""

PROBLEMS = {
    "cpu": {
        "gemm": (
            "gemm[m=1,n=1536,k=1024,transpose=nt]",
            "gemm[m=1,n=7168,k=1024,transpose=nt]",
            "gemm[m=16,n=7168,k=1024,transpose=nt]",
            "gemm[m=16,n=1024,k=3584,transpose=nt]",
            "gemm[m=128,n=1536,k=1024,transpose=nt]",
            "gemm[m=128,n=7168,k=1024,transpose=nt]",
            "gemm[m=128,n=1024,k=3584,transpose=nt]",
            "gemm[m=1,n=2304,k=768,transpose=nt,epilogue=bias]",
            "gemm[m=128,n=2304,k=768,transpose=nt,epilogue=bias]",
            "gemm[m=128,n=768,k=768,transpose=nt,epilogue=bias]",
            "gemm[m=128,n=3072,k=768,transpose=nt,epilogue=bias_gelu]",
            "gemm[m=128,n=768,k=3072,transpose=nt,epilogue=bias]",
            "gemm[m=128,n=2048,k=512,transpose=nt,epilogue=bias_relu]",
        ),
        "attention": (
            "attention[b=1,h=8,hkv=2,sq=256,d=128,causal]",
            "attention[b=1,h=8,hkv=2,sq=1,sk=4096,d=128]",
            "attention[b=1,h=12,sq=128,d=64]",
            "attention[b=1,h=12,sq=512,d=64,causal]",
        ),
        "softmax": ("softmax[m=16,n=128256]", "softmax[m=1536,n=128]", "softmax[m=6144,n=512]"),
        "layernorm": (
            "layernorm[m=16,n=4096,rms]",
            "layernorm[m=512,n=4096,rms]",
            "layernorm[m=128,n=768]",
            "layernorm[m=1024,n=768]",
        ),
    },
    "cuda": {
        "gemm": (
            "gemm[m=1,n=6144,k=4096,transpose=nt]",
            "gemm[m=1,n=4096,k=4096,transpose=nt]",
            "gemm[m=1,n=28672,k=4096,transpose=nt]",
            "gemm[m=1,n=4096,k=14336,transpose=nt]",
            "gemm[m=64,n=6144,k=4096,transpose=nt]",
            "gemm[m=64,n=4096,k=4096,transpose=nt]",
            "gemm[m=64,n=28672,k=4096,transpose=nt]",
            "gemm[m=64,n=4096,k=14336,transpose=nt]",
            "gemm[m=64,n=128256,k=4096,transpose=nt]",
            "gemm[m=4096,n=6144,k=4096,transpose=nt]",
            "gemm[m=4096,n=4096,k=4096,transpose=nt]",
            "gemm[m=4096,n=28672,k=4096,transpose=nt]",
            "gemm[m=4096,n=4096,k=14336,transpose=nt]",
            "gemm[m=16,n=1280,k=8192,transpose=nt]",
            "gemm[m=16,n=8192,k=1024,transpose=nt]",
            "gemm[m=16,n=7168,k=8192,transpose=nt]",
            "gemm[m=16,n=8192,k=3584,transpose=nt]",
            "gemm[m=8192,n=1280,k=8192,transpose=nt]",
            "gemm[m=8192,n=8192,k=1024,transpose=nt]",
            "gemm[m=8192,n=7168,k=8192,transpose=nt]",
            "gemm[m=8192,n=8192,k=3584,transpose=nt]",
            "gemm[m=16,n=2304,k=768,transpose=nt,epilogue=bias]",
            "gemm[m=16384,n=2304,k=768,transpose=nt,epilogue=bias]",
            "gemm[m=16384,n=768,k=768,transpose=nt,epilogue=bias]",
            "gemm[m=16384,n=3072,k=768,transpose=nt,epilogue=bias_gelu]",
            "gemm[m=16384,n=768,k=3072,transpose=nt,epilogue=bias]",
            "gemm[m=16384,n=2048,k=512,transpose=nt,epilogue=bias_relu]",
        ),
        "attention": (
            "attention[b=1,h=32,hkv=8,sq=1,sk=8192,d=128]",
            "attention[b=64,h=32,hkv=8,sq=1,sk=4096,d=128]",
            "attention[b=1,h=64,hkv=8,sq=1,sk=131072,d=128]",
            "attention[b=1,h=32,hkv=8,sq=8192,d=128,causal]",
            "attention[b=4,h=8,hkv=1,sq=4096,d=128,causal]",
            "attention[b=32,h=12,sq=512,d=64]",
            "attention[b=16,h=12,sq=1024,d=64,causal]",
        ),
        "softmax": ("softmax[m=64,n=128256]", "softmax[m=4096,n=128256]", "softmax[m=196608,n=512]"),
        "layernorm": (
            "layernorm[m=1,n=4096,rms]",
            "layernorm[m=64,n=8192,rms]",
            "layernorm[m=4096,n=4096,rms]",
            "layernorm[m=8192,n=8192,rms]",
            "layernorm[m=16384,n=768]",
        ),
    },
}
