"""Machine code as the disassembler prints it, small enough to be read."""

from __future__ import annotations

# A kernel of 8 warps and a tile of 128x128: one K block an iteration. The wait at 0x0030 goes to its retry behind the
# end, which jumps back into the loop; the last line is the padding of every kernel.
PLAIN = """
		Function : plain
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0xf0 ;                                    /* 0x0000000000100947 */
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0030*/              @!P0 BRA 0x100 ;
        /*0040*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0050*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT ;
        /*0060*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24 ;
        /*0070*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24 ;
        /*0080*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   FFMA R88, R24, R4, R88 ;
        /*00a0*/                   FFMA R89, R25, R4, R89 ;
        /*00b0*/                   @UP0 UTMALDG.2D [UR8], [UR4] ;
        /*00c0*/               @P1 BRA 0x20 ;
        /*00d0*/                   STG.E.128 desc[UR6][R2.64], R88 ;
        /*00e0*/                   STG.E.U16 desc[UR6][R2.64+0x10], R90 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0110*/              @!P0 BRA 0x100 ;
        /*0120*/                   BRA 0x40 ;
        /*0130*/                   BRA 0x130;
"""

# A loop over tiles around a loop over K blocks, twice: two consumers.
NESTED = """
		Function : nested
        /*0000*/                   USETMAXREG.DEALLOC.CTAPOOL 0x78 ;
        /*0010*/               @P0 BRA 0x80 ;
        /*0020*/                   S2R R0, SR_TID.X ;
        /*0030*/                   QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/                   STS.128 [R2], R24 ;
        /*0060*/               @P2 BRA 0x20 ;
        /*0070*/                   EXIT ;
        /*0080*/                   S2R R0, SR_TID.X ;
        /*0090*/                   QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT ;
        /*00a0*/                   FFMA R88, R24, R4, R88 ;
        /*00b0*/               @P1 BRA 0x90 ;
        /*00c0*/               @P2 BRA 0x80 ;
        /*00d0*/                   EXIT ;
"""

# 512 bytes in and 512 out in the loop; a narrow access outside.
COPY = """
		Function : copy
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   STG.E.128 desc[UR4][R8.64], R4 ;
        /*0030*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   EXIT ;
"""

# The quotient of rare operands is made by a subroutine behind the end, and padding follows.
DIVISION = """
		Function : division
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   FCHK P0, R4, 448 ;
        /*0020*/                   FFMA R5, R4, R6, RZ ;
        /*0030*/              @!P0 BRA 0x70 ;
        /*0040*/                   MOV R8, 0x60 ;
        /*0050*/                   CALL.REL.NOINC 0x90 ;
        /*0060*/                   MOV R5, R9 ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   FADD R9, R4, R4 ;
        /*00a0*/                   RET.REL.NODEC R8 0x0 ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
"""

ASSEMBLER = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    16 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 4 barriers
"""
