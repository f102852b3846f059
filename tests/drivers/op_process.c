// SPDX-License-Identifier: MIT
/* Who makes the call: children, threads, exec'd images, reused pids. */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <linux/sched.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static struct endpoint source;
static size_t size;

static void read_once(void)
{
	carried("read", source.kind, USER_MEMORY, read(source.fd, buffer(), size));
}

static void prepare(const struct options *options)
{
	open_source(&source, options);
	size = options->size;
	buffer();
}

static void reap(pid_t pid)
{
	int status;

	if (pid < 0)
		fail("fork");
	if (waitpid(pid, &status, 0) < 0)
		fail("waitpid");
	if (status)
		_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

static void run_fork(const struct operation *op, const struct options *options)
{
	(void)op;
	prepare(options);
	for (long i = 0; i < options->count; i++) {
		pid_t pid = fork();

		if (!pid) {
			read_once();
			_exit(0);
		}
		reap(pid);
	}
}

/* Every process but the last has one child: all are alive at once. */
static void run_fork_chain(const struct operation *op, const struct options *options)
{
	(void)op;
	prepare(options);
	for (long i = 0; i < options->count; i++) {
		pid_t pid = fork();

		if (pid) {
			reap(pid);
			if (i)
				_exit(0);
			return;
		}
		read_once();
	}
	_exit(0);
}

static void run_vfork(const struct operation *op, const struct options *options)
{
	(void)op;
	prepare(options);
	for (long i = 0; i < options->count; i++) {
		pid_t pid = vfork();

		if (!pid) {
			read_once();
			_exit(0);
		}
		reap(pid);
	}
}

static void *thread(void *unused)
{
	read_once();
	return unused;
}

static void run_threads(const struct operation *op, const struct options *options)
{
	(void)op;
	prepare(options);
	for (long i = 0; i < options->count; i++) {
		pthread_t id;

		errno = pthread_create(&id, NULL, thread, NULL);
		if (errno || pthread_join(id, NULL))
			fail("pthread_create");
	}
}

/* A child whose parent is gone by the time it reads. */
static void run_orphan(const struct operation *op, const struct options *options)
{
	pid_t parent;
	int status;

	(void)op;
	prepare(options);
	if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0)
		fail("PR_SET_CHILD_SUBREAPER");
	parent = fork();
	if (!parent) {
		pid_t me = getpid();

		if (fork())
			_exit(0);
		while (getppid() == me)
			usleep(100);
		for (long i = 0; i < options->count; i++)
			read_once();
		_exit(0);
	}
	reap(parent);
	if (wait(&status) < 0 || status)
		fail("orphan");
}

/* Runs itself again and again; the descriptors and the account stay. */
static void run_exec(const struct operation *op, const struct options *options)
{
	char account[16], count[32];
	char *argv[] = {(char *)"driver",
			(char *)"exec",
			(char *)"-i",
			account,
			(char *)"-n",
			count,
			(char *)"-s",
			NULL,
			(char *)"-d",
			(char *)options->directory,
			(char *)"-o",
			(char *)options->output,
			NULL};
	char bytes[32];

	(void)op;
	if (!options->output) {
		errno = EINVAL;
		fail("-o");
	}
	prepare(options);
	read_once();
	if (options->count == 1)
		return;
	snprintf(account, sizeof(account), "%d", account_descriptor());
	snprintf(count, sizeof(count), "%ld", options->count - 1);
	snprintf(bytes, sizeof(bytes), "%zu", options->size);
	argv[7] = bytes;
	execv("/proc/self/exe", argv);
	fail("execv");
}

static pid_t fork_as(pid_t pid)
{
	struct clone_args args = {
		.exit_signal = SIGCHLD,
		.set_tid = pid ? (__u64)(uintptr_t)&pid : 0,
		.set_tid_size = pid ? 1 : 0,
	};

	return (pid_t)syscall(SYS_clone3, &args, sizeof(args));
}

/* COUNT processes, one after the other, all with the same pid. */
static void run_pid_reuse(const struct operation *op, const struct options *options)
{
	pid_t first = 0;

	(void)op;
	prepare(options);
	for (long i = 0; i < options->count; i++) {
		pid_t pid = fork_as(first);

		if (!pid) {
			char name[16];

			snprintf(name, sizeof(name), "reuse-%hd", (short)i);
			prctl(PR_SET_NAME, name, 0, 0, 0);
			read_once();
			_exit(0);
		}
		if (pid < 0)
			unsupported("clone3 with set_tid");
		reap(pid);
		first = pid;
	}
	account_pid(first);
}

#ifdef __x86_64__
/* The 32-bit entry from 64-bit code: number 3 is read(2) there. */
static ssize_t read_int80(int fd, void *data, size_t length)
{
	long result;

	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(3), "b"(fd), "c"(data), "d"(length)
			 : "memory", "r8", "r9", "r10", "r11");
	if (result < 0) {
		errno = (int)-result;
		return -1;
	}
	return result;
}

static void run_int80(const struct operation *op, const struct options *options)
{
	void *low = mmap(NULL, options->size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);

	(void)op;
	if (low == MAP_FAILED)
		fail("MAP_32BIT");
	prepare(options);
	for (long i = 0; i < options->count; i++) {
		ssize_t got = read_int80(source.fd, low, options->size);

		if (got < 0 && errno == ENOSYS)
			unsupported("int 0x80");
		carried("read", source.kind, USER_MEMORY, got);
	}
}
#endif

const struct operation process_operations[] = {
	{"fork", run_fork, "file", NULL, NULL},
	{"fork-chain", run_fork_chain, "file", NULL, NULL},
	{"vfork", run_vfork, "file", NULL, NULL},
	{"threads", run_threads, "file", NULL, NULL},
	{"orphan", run_orphan, "file", NULL, NULL},
	{"exec", run_exec, "file", NULL, NULL},
	{"pid-reuse", run_pid_reuse, "file", NULL, NULL},
#ifdef __x86_64__
	{"int80", run_int80, "file", NULL, NULL},
#endif
	{0},
};
