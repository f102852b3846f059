// SPDX-License-Identifier: GPL-2.0-only
/*
 * Reading kernel memory, with offsets from BTF (layout.py), so that no kernel header is needed.
 *
 * DIRECT: tp_btf programs on kernels with bpf_rdonly_cast() (6.2). An address is cast to
 * struct pt_regs, whose members are all plain words, and loaded by one instruction that the
 * verifier guards with an exception table: about 1 ns. The cast costs nothing, the verifier
 * turns it into a register move. CAST_CALL is replaced by the kfunc when the program is loaded.
 * Otherwise: bpf_probe_read_kernel(), 10 to 30 ns each.
 *
 * The loads are written in assembly to keep BCC's rewriter and the optimizer away from them.
 */
#define CAST_CALL 0x7fff0001

/*
 * Helpers by number (enum bpf_func_id, 5.5). Under their own names BCC would look each of them up
 * in /proc/kallsyms, call by call: a second of start-up, and the wrong helper where it is hidden.
 */
static long (*read_user)(void *to, u32 size, const void *from) = (void *)112;
static long (*read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static long (*read_kernel_string)(void *to, u32 size, const void *from) = (void *)115;

#if DIRECT
static u64 (*rdonly_cast)(u64 address, u32 type) = (void *)CAST_CALL;
#define DEFINE_READ(bits)                                                                          \
	static __always_inline u64 read##bits(u64 address)                                         \
	{                                                                                          \
		u64 words = rdonly_cast(address, BTF_PT_REGS), value;                              \
		asm volatile("%0 = *(u" #bits " *)(%1 + 0)" : "=r"(value) : "r"(words));           \
		return value;                                                                      \
	}
#else
#define DEFINE_READ(bits)                                                                          \
	static __always_inline u64 read##bits(u64 address)                                         \
	{                                                                                          \
		u##bits value = 0;                                                                 \
		read_kernel(&value, sizeof(value), (void *)address);                               \
		return value;                                                                      \
	}
#endif

DEFINE_READ(64)
DEFINE_READ(32)
DEFINE_READ(16)
DEFINE_READ(8)

/* For programs that are no tracing programs, and so never have the faster reads. */
#define DEFINE_SLOW(bits)                                                                          \
	static __always_inline u64 slow##bits(u64 address)                                         \
	{                                                                                          \
		u##bits value = 0;                                                                 \
		read_kernel(&value, sizeof(value), (void *)address);                               \
		return value;                                                                      \
	}
DEFINE_SLOW(64)
DEFINE_SLOW(32)
DEFINE_SLOW(8)

/*
 * Several members of one small structure: it is cast once, since what stands in registers does not
 * survive a cast. Offsets are constants, and end before struct pt_regs does (168 bytes).
 */
#if DIRECT
static __always_inline u64 look_at(u64 address)
{
	return rdonly_cast(address, BTF_PT_REGS);
}
#define DEFINE_SEEN(bits)                                                                          \
	static __always_inline u64 seen##bits(u64 looked_at, const int offset)                     \
	{                                                                                          \
		u64 value;                                                                         \
		asm volatile("%0 = *(u" #bits " *)(%1 + %2)"                                       \
			     : "=r"(value)                                                         \
			     : "r"(looked_at), "i"(offset));                                       \
		return value;                                                                      \
	}
#else
static __always_inline u64 look_at(u64 address)
{
	return address;
}
#define DEFINE_SEEN(bits)                                                                          \
	static __always_inline u64 seen##bits(u64 looked_at, const int offset)                     \
	{                                                                                          \
		return read##bits(looked_at + offset);                                             \
	}
#endif

DEFINE_SEEN(64)
DEFINE_SEEN(32)

/*
 * An argument as a number. The verifier knows arguments for the pointers that they are, and forbids
 * to reckon with them: what a helper has copied is unknown to it.
 */
static __always_inline u64 plain(u64 pointer)
{
	u64 kept = pointer, value = 0;

	read_kernel(&value, sizeof(value), &kept);
	return value;
}

/* Argument n of a raw tracepoint, n a constant. */
static __always_inline u64 tracepoint_arg(u64 *ctx, const int n)
{
	u64 value;

	asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(value) : "r"(ctx), "i"(n * 8));
	return value;
}
