"""Constants of the vector exp2 in kernels/common/numba.py."""

# 2^f on [-1/2, 1/2] by a polynomial with constant term 1, by degree: minimax of the relative error (1.0e-4,
# 2.8e-6, 8.1e-8, 2.0e-9), found by linear programming on 4001 Chebyshev points. With degree 6 the whole exp2
# stays below 1 ulp in fp32.
EXP2 = {
    3: (0.6932829272500448, 0.242210962524093, 0.05500893279457575),
    4: (0.6931241838059968, 0.24024039573659797, 0.05590662679395617, 0.009585323722297196),
    5: (
        *(0.6931470613724577, 0.24022235415808996, 0.0555067863399561),
        *(0.009671958066682652, 0.0013274558141584633),
    ),
    6: (
        *(0.6931472028552566, 0.24022647913618358, 0.05550332470978952),
        *(0.009618437359802938, 0.0013398874445692311, 0.00015353361354431761),
    ),
}
ROUND = 12582912.0 + 127  # 1.5 * 2^23: adding it leaves the nearest whole number, with fp32's bias, in the low bits
