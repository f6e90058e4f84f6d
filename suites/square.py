"""Square products from 256 to 16384 (a CPU: to 2048), and sizes just beside powers of two."""

PROBLEMS = {
    "cpu": {
        "gemm": (
            "gemm[m=256,n=256,k=256]",
            "gemm[m=512,n=512,k=512]",
            "gemm[m=1000,n=1000,k=1000]",
            "gemm[m=1023,n=1023,k=1023]",
            "gemm[m=1024,n=1024,k=1024]",
            "gemm[m=1025,n=1025,k=1025]",
            "gemm[m=2048,n=2048,k=2048]",
        ),
    },
    "cuda": {
        "gemm": (
            "gemm[m=256,n=256,k=256]",
            "gemm[m=512,n=512,k=512]",
            "gemm[m=1000,n=1000,k=1000]",
            "gemm[m=1024,n=1024,k=1024]",
            "gemm[m=2048,n=2048,k=2048]",
            "gemm[m=4095,n=4095,k=4095]",
            "gemm[m=4096,n=4096,k=4096]",
            "gemm[m=4097,n=4097,k=4097]",
            "gemm[m=4224,n=2048,k=8192]",  # 264 tiles of 128 x 256: two whole waves on 132 multiprocessors
            "gemm[m=6000,n=6000,k=6000]",
            "gemm[m=8192,n=8192,k=8192]",
            "gemm[m=16384,n=16384,k=16384]",
        ),
    },
}
