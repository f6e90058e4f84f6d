"""The FlashAttention protocol: width 2048, 16 Ki tokens, heads of 64, 128 and 256, causal and full; and decode.

On a CPU the width is 512 and there are 1 Ki tokens, so that a call stays in the tens of milliseconds.
"""

PROBLEMS = {
    "cpu": {
        "attention": (
            "attention[b=4,h=8,sq=256,d=64]",
            "attention[b=4,h=8,sq=256,d=64,causal]",
            "attention[b=1,h=8,sq=1024,d=64]",
            "attention[b=1,h=8,sq=1024,d=64,causal]",
            "attention[b=4,h=4,sq=256,d=128]",
            "attention[b=4,h=4,sq=256,d=128,causal]",
            "attention[b=1,h=4,sq=1024,d=128]",
            "attention[b=1,h=4,sq=1024,d=128,causal]",
            "attention[b=1,h=2,sq=1024,d=256,causal]",
            "attention[b=1,h=8,hkv=2,sq=1,sk=8192,d=128]",
            "attention[b=8,h=8,hkv=2,sq=1,sk=1024,d=128]",
        ),
    },
    "cuda": {
        "attention": (
            "attention[b=32,h=32,sq=512,d=64]",
            "attention[b=16,h=32,sq=1024,d=64]",
            "attention[b=8,h=32,sq=2048,d=64]",
            "attention[b=4,h=32,sq=4096,d=64]",
            "attention[b=2,h=32,sq=8192,d=64]",
            "attention[b=1,h=32,sq=16384,d=64]",
            "attention[b=32,h=16,sq=512,d=128]",
            "attention[b=16,h=16,sq=1024,d=128]",
            "attention[b=8,h=16,sq=2048,d=128]",
            "attention[b=4,h=16,sq=4096,d=128]",
            "attention[b=2,h=16,sq=8192,d=128]",
            "attention[b=1,h=16,sq=16384,d=128]",
            "attention[b=32,h=8,sq=512,d=256]",
            "attention[b=4,h=8,sq=4096,d=256]",
            "attention[b=1,h=8,sq=16384,d=256]",
            "attention[b=32,h=32,sq=512,d=64,causal]",
            "attention[b=16,h=32,sq=1024,d=64,causal]",
            "attention[b=8,h=32,sq=2048,d=64,causal]",
            "attention[b=4,h=32,sq=4096,d=64,causal]",
            "attention[b=2,h=32,sq=8192,d=64,causal]",
            "attention[b=1,h=32,sq=16384,d=64,causal]",
            "attention[b=32,h=16,sq=512,d=128,causal]",
            "attention[b=16,h=16,sq=1024,d=128,causal]",
            "attention[b=8,h=16,sq=2048,d=128,causal]",
            "attention[b=4,h=16,sq=4096,d=128,causal]",
            "attention[b=2,h=16,sq=8192,d=128,causal]",
            "attention[b=1,h=16,sq=16384,d=128,causal]",
            "attention[b=32,h=8,sq=512,d=256,causal]",
            "attention[b=4,h=8,sq=4096,d=256,causal]",
            "attention[b=1,h=8,sq=16384,d=256,causal]",
            "attention[b=128,h=32,hkv=8,sq=1,sk=1024,d=128]",
            "attention[b=16,h=32,hkv=8,sq=1,sk=8192,d=128]",
            "attention[b=1,h=64,hkv=8,sq=1,sk=131072,d=128]",
        ),
    },
}
