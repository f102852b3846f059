// SPDX-License-Identifier: MIT
/*
 * floor CMD [ARG...]
 *
 * Attaches an empty BPF program to the raw tracepoint sys_exit and becomes CMD: what no tracer
 * of system calls on this machine can be cheaper than. The program goes when CMD ends.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	return (int)syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int load_empty_program(void)
{
	static const struct bpf_insn return_0[] = {
		{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0},
		{.code = BPF_JMP | BPF_EXIT},
	};
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = BPF_PROG_TYPE_RAW_TRACEPOINT;
	attr.insns = (__u64)(unsigned long)return_0;
	attr.insn_cnt = sizeof(return_0) / sizeof(*return_0);
	attr.license = (__u64)(unsigned long)"MIT";
	return bpf(BPF_PROG_LOAD, &attr);
}

static int attach_to_sys_exit(int program)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.raw_tracepoint.name = (__u64)(unsigned long)"sys_exit";
	attr.raw_tracepoint.prog_fd = (__u32)program;
	return bpf(BPF_RAW_TRACEPOINT_OPEN, &attr);
}

int main(int argc, char **argv)
{
	int program, link;

	if (argc < 2)
		errx(1, "usage: floor CMD [ARG...]");
	program = load_empty_program();
	if (program < 0)
		err(1, "cannot load a BPF program");
	link = attach_to_sys_exit(program);
	if (link < 0 || fcntl(link, F_SETFD, 0) < 0)
		err(1, "cannot attach to sys_exit");
	execvp(argv[1], argv + 1);
	err(1, "%s", argv[1]);
}
