// SPDX-License-Identifier: MIT
/* What the driver did, kept where children, threads and exec'd images add. */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CALLS_MAX 64

struct call {
	char via[32];
	char source[32];
	char destination[32];
	long operations;
	long bytes;
};

static struct account {
	atomic_flag lock;
	int calls;
	long faults;
	long notified;
	long notified_copied;
	pid_t pid;
	struct call call[CALLS_MAX];
} * account;

static int descriptor = -1;

void fail(const char *what)
{
	fprintf(stderr, "driver: %s: %s\n", what, strerror(errno));
	_exit(1);
}

void unsupported(const char *what)
{
	fprintf(stderr, "driver: not supported here: %s: %s\n", what, strerror(errno));
	_exit(EXIT_UNSUPPORTED);
}

void account_open(int inherited)
{
	descriptor = inherited;
	if (descriptor < 0) {
		descriptor = memfd_create("account", 0);
		if (descriptor < 0 || ftruncate(descriptor, sizeof(*account)) < 0)
			fail("memfd");
	}
	account = mmap(NULL, sizeof(*account), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
	if (account == MAP_FAILED)
		fail("mmap");
}

int account_descriptor(void)
{
	return descriptor;
}

static void lock(void)
{
	while (atomic_flag_test_and_set(&account->lock))
		usleep(1);
}

static void unlock(void)
{
	atomic_flag_clear(&account->lock);
}

static struct call *find(const char *via, const char *source, const char *destination)
{
	struct call *call = account->call;

	for (; call < account->call + account->calls; call++)
		if (!strcmp(call->via, via) && !strcmp(call->source, source) &&
		    !strcmp(call->destination, destination))
			return call;
	if (account->calls == CALLS_MAX) {
		errno = ENOSPC;
		fail("account");
	}
	account->calls++;
	snprintf(call->via, sizeof(call->via), "%s", via);
	snprintf(call->source, sizeof(call->source), "%s", source);
	snprintf(call->destination, sizeof(call->destination), "%s", destination);
	return call;
}

/* Accounts one call by its result; without payload it is no operation. */
ssize_t carried(const char *via, const char *source, const char *destination, ssize_t result)
{
	struct call *call;

	if (result < 0)
		fail(via);
	if (result == 0)
		return 0;
	lock();
	call = find(via, source, destination);
	call->operations++;
	call->bytes += result;
	unlock();
	return result;
}

void account_faults(long faults)
{
	account->faults += faults;
}

/* The kernel's word on @calls zero-copy sends. */
void account_notification(bool copied, long calls)
{
	account->notified += calls;
	if (copied)
		account->notified_copied += calls;
}

void account_pid(pid_t pid)
{
	account->pid = pid;
}

static void print(FILE *out)
{
	fprintf(out, "{\"calls\": [");
	for (int i = 0; i < account->calls; i++) {
		const struct call *call = &account->call[i];

		fprintf(out,
			"%s\n  {\"via\": \"%s\", \"source\": \"%s\","
			" \"destination\": \"%s\", \"operations\": %ld,"
			" \"bytes\": %ld}",
			i ? "," : "", call->via, call->source, call->destination, call->operations,
			call->bytes);
	}
	fprintf(out,
		"],\n \"faults\": %ld, \"notified\": %ld,"
		" \"notified_copied\": %ld, \"pid\": %d}\n",
		account->faults, account->notified, account->notified_copied, account->pid);
}

/* Through a mapping: a write(2) would be one more call to account for. */
static void store(const char *path, const char *text, size_t size)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	void *map;

	if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
		fail(path);
	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		fail(path);
	memcpy(map, text, size);
	munmap(map, size);
	close(fd);
}

void report(const char *output)
{
	char *text = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&text, &size);

	if (!out)
		fail("report");
	print(out);
	fclose(out);
	if (output)
		store(output, text, size);
	else if (write(STDOUT_FILENO, text, size) != (ssize_t)size)
		fail("standard output");
	free(text);
}
