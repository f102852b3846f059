// SPDX-License-Identifier: MIT
/* Memory of processes, page faults and shared extents. */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

#define FAULT_AROUND (1UL << 16) /* the kernel's default window */

typedef ssize_t transfer(pid_t pid, const struct iovec *local, unsigned long locals,
			 const struct iovec *remote, unsigned long remotes, unsigned long flags);

struct how {
	transfer *transfer;
};

static void run_process_vm(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	char *data = buffer();
	struct iovec local = {data, options->size};
	struct iovec remote = {data + BUFFER_SIZE / 2, options->size};

	if (options->size > BUFFER_SIZE / 2) {
		errno = EINVAL;
		fail("size");
	}
	for (long i = 0; i < options->count; i++)
		carried(op->name, USER_MEMORY, USER_MEMORY,
			how->transfer(getpid(), &local, 1, &remote, 1, 0));
}

static long faults(void)
{
	struct rusage usage;

	if (getrusage(RUSAGE_SELF, &usage) < 0)
		fail("getrusage");
	return usage.ru_minflt + usage.ru_majflt;
}

/* One touch in each fault-around window of a cached file: one fault each. */
static void run_mmap(const struct operation *op, const struct options *options)
{
	struct options windows = *options;
	size_t length = (size_t)options->count * FAULT_AROUND;
	struct endpoint source;
	const volatile char *map;
	long before;

	(void)op;
	windows.size = FAULT_AROUND;
	open_source(&source, &windows);
	map = mmap(NULL, length, PROT_READ, MAP_SHARED, source.fd, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	before = faults();
	for (long i = 0; i < options->count; i++)
		(void)map[(size_t)i * FAULT_AROUND];
	account_faults(faults() - before);
}

static void run_ficlone(const struct operation *op, const struct options *options)
{
	struct endpoint source, sink;

	(void)op;
	open_source(&source, options);
	open_sink(&sink, options);
	for (long i = 0; i < options->count; i++) {
		off_t size = lseek(source.fd, 0, SEEK_END);

		if (ioctl(sink.fd, FICLONE, source.fd) < 0)
			unsupported("FICLONE");
		carried("ioctl FICLONE", source.kind, sink.kind, size);
	}
}

static void run_ficlonerange(const struct operation *op, const struct options *options)
{
	struct endpoint source, sink;

	(void)op;
	open_source(&source, options);
	open_sink(&sink, options);
	for (long i = 0; i < options->count; i++) {
		struct file_clone_range range = {
			.src_fd = source.fd,
			.src_offset = (__u64)i * options->size,
			.src_length = options->size,
			.dest_offset = (__u64)i * options->size,
		};

		if (ioctl(sink.fd, FICLONERANGE, &range) < 0)
			unsupported("FICLONERANGE");
		carried("ioctl FICLONERANGE", source.kind, sink.kind, (ssize_t)options->size);
	}
}

const struct operation memory_operations[] = {
	{"process_vm_readv", run_process_vm, NULL, NULL, &(const struct how){process_vm_readv}},
	{"process_vm_writev", run_process_vm, NULL, NULL, &(const struct how){process_vm_writev}},
	{"mmap", run_mmap, "file", NULL, NULL},
	{"FICLONE", run_ficlone, "file", "file", NULL},
	{"FICLONERANGE", run_ficlonerange, "file", "file", NULL},
	{0},
};
