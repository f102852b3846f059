/* SPDX-License-Identifier: MIT */
/* See check.h. */
#define _GNU_SOURCE
#include "check.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

static char trying[512] = "?";
static const char *directory = ".";
void (*around_calls)(bool before);

void about(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(trying, sizeof(trying), format, arguments);
	va_end(arguments);
}

void fail_at(const char *file, int line, const char *what)
{
	fprintf(stderr, "%s:%d: %s: not so: %s (errno: %s)\n", file, line, trying, what,
		strerror(errno));
	/* The fuzzer wants a crash, and so do those who debug one. */
	if (getenv("CHECK_ABORT"))
		abort();
	exit(EXIT_FAILURE);
}

void differ_at(const char *file, int line, const char *what, long long is, long long expected)
{
	char text[256];

	snprintf(text, sizeof(text), "%s: is %lld, expected %lld", what, is, expected);
	fail_at(file, line, text);
}

void skip(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(EXIT_SKIP);
}

uint8_t pattern(size_t i)
{
	return (uint8_t)(((uint32_t)i * 2654435761u) >> 13 ^ i);
}

unsigned int descriptors(void)
{
	DIR *open_files = opendir("/proc/self/fd");
	unsigned int nr = 0;

	CHECK(open_files);
	while (readdir(open_files))
		nr++;
	closedir(open_files);
	return nr - 3; /* ".", ".." and the directory itself */
}

void use_directory(int argc, char **argv)
{
	if (argc > 1)
		directory = argv[1];
}

int scratch_file(int flags)
{
	char path[4096];
	int fd, again;

	snprintf(path, sizeof(path), "%s/scratch-XXXXXX", directory);
	fd = mkostemp(path, O_CLOEXEC);
	CHECK(fd >= 0);
	again = open(path, O_RDWR | O_CLOEXEC | flags);
	CHECK(again >= 0 || errno == EINVAL);
	unlink(path);
	if (again < 0)
		skip("%s: its filesystem has no O_DIRECT", directory);
	close(fd);
	return again;
}

void scratch_directory(char *path, size_t size)
{
	CHECK((size_t)snprintf(path, size, "%s/scratch-XXXXXX", directory) < size);
	CHECK(mkdtemp(path));
}

static void out_of_time(int number)
{
	static const char text[] = "a call hangs: ";

	(void)number;
	/* Not by write(2), which may be what is made to fail. */
	syscall(SYS_write, STDERR_FILENO, text, sizeof(text) - 1);
	syscall(SYS_write, STDERR_FILENO, trying, strlen(trying));
	syscall(SYS_write, STDERR_FILENO, "\n", 1);
	if (getenv("CHECK_ABORT"))
		abort();
	_exit(EXIT_FAILURE);
}

void limit_seconds(unsigned int seconds)
{
	signal(SIGALRM, out_of_time);
	alarm(seconds);
}

int memory_of(size_t size)
{
	uint8_t *bytes;
	size_t i;
	int fd = memfd_create("memory", MFD_CLOEXEC);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)size));
	if (!size)
		return fd;
	bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(bytes != MAP_FAILED);
	for (i = 0; i < size; i++)
		bytes[i] = pattern(i);
	munmap(bytes, size);
	return fd;
}

static struct rsplice_result sum(const struct rsplice_result *one, const struct rsplice_result *two)
{
	return (struct rsplice_result){.moved = one->moved + two->moved,
				       .shared = one->shared + two->shared,
				       .direct = one->direct + two->direct,
				       .copied = one->copied + two->copied,
				       .unknown = one->unknown + two->unknown,
				       .why = one->why | two->why};
}

static uint64_t bytes_of(const struct rsplice_result *result)
{
	return result->moved + result->shared + result->direct + result->copied + result->unknown;
}

const char *transfer_name(const struct transfer *transfer)
{
	static char name[256];

	snprintf(name, sizeof(name), "%s -> %s, %zu bytes from %zu to %zu, %zu at a time%s%s%s%s%s",
		 origin_names[transfer->origin_kind], sink_names[transfer->sink_kind],
		 transfer->size, transfer->from, transfer->start, transfer->len,
		 transfer->positions ? ", own positions" : "",
		 transfer->flags & RSPLICE_F_NONBLOCK ? ", NONBLOCK" : "",
		 transfer->flags & RSPLICE_F_STRICT ? ", STRICT" : "",
		 transfer->flags & RSPLICE_F_SHARE ? ", SHARE" : "",
		 transfer->flags & RSPLICE_F_READAHEAD ? ", READAHEAD" : "");
	return name;
}

const char *transfer_begin(struct transfer *transfer)
{
	struct sink *sink = &transfer->sink;
	const char *why = sink_open(sink, transfer->sink_kind, transfer->start);

	if (why)
		return why;
	why = origin_open(&transfer->origin, transfer->origin_kind, transfer->size);
	if (why) {
		sink_close(sink);
		return why;
	}
	transfer->at = transfer->origin.seekable ? transfer->from : 0;
	transfer->ended = false;
	transfer->errors = 0;
	transfer->total = (struct rsplice_result){0};
	if (transfer->positions && transfer->origin.seekable)
		CHECK_EQUAL(lseek(transfer->origin.fd, (off_t)transfer->from, SEEK_SET),
			    transfer->from);
	if (transfer->positions && sink_in_memory(sink))
		CHECK_EQUAL(lseek(sink->fd, (off_t)sink->start, SEEK_SET), sink->start);
	return NULL;
}

static ssize_t call(struct transfer *transfer, int64_t *off_in, int64_t *off_out,
		    struct rsplice_result *result)
{
	struct origin *origin = &transfer->origin;
	struct sink *sink = &transfer->sink;

	errno = 0;
	if (transfer->sink_kind == SINK_FUSE)
		return rsplice_fuse_reply(sink->fd, 23, origin->fd, off_in, transfer->len,
					  transfer->flags, result);
	return rsplice(origin->fd, off_in, sink->fd, off_out, transfer->len, transfer->flags,
		       result);
}

/* The descriptors' own positions, which only calls without offsets use. */
static void check_positions(const struct transfer *transfer)
{
	const struct origin *origin = &transfer->origin;
	const struct sink *sink = &transfer->sink;
	bool own = transfer->positions;

	if (origin->seekable)
		CHECK_EQUAL(lseek(origin->fd, 0, SEEK_CUR), own ? transfer->at : 0);
	if (sink_in_memory(sink))
		CHECK_EQUAL(lseek(sink->fd, 0, SEEK_CUR), own ? sink->start + sink->taken : 0);
}

static void check_arrived(struct transfer *transfer, size_t expected)
{
	static uint8_t bytes[4 * MIB];
	struct origin *origin = &transfer->origin;
	size_t i;

	CHECK(expected <= sizeof(bytes));
	sink_take(&transfer->sink, bytes, expected);
	for (i = 0; i < expected; i++) {
		if (bytes[i] != origin_byte(origin, transfer->at + i))
			differ_at(__FILE__, __LINE__, "byte", bytes[i],
				  origin_byte(origin, transfer->at + i));
	}
	transfer->at += expected;
	CHECK(!expected || transfer->at <= origin->size || origin->kind == ORIGIN_ZERO);
}

/* Nothing is lost: what was neither taken nor is waiting is carried over. */
static void check_kept(struct transfer *transfer, bool failed)
{
	struct origin *origin = &transfer->origin;
	size_t kept = rsplice_pending(origin->fd) + origin_waiting(origin);

	if (origin->seekable || origin->kind == ORIGIN_ZERO) {
		CHECK_EQUAL(rsplice_pending(origin->fd), 0);
		return;
	}
	/* Nobody tells how many messages wait; each reply has one. */
	if (origin->kind == ORIGIN_DGRAM) {
		if (failed && transfer->may_lose && transfer->may_lose(transfer) &&
		    !rsplice_pending(origin->fd))
			transfer->at += origin->size - transfer->at < MESSAGE
						? origin->size - transfer->at
						: MESSAGE;
		return;
	}
	if (transfer->may_lose && transfer->may_lose(transfer)) {
		CHECK(transfer->at + kept <= origin->size);
		transfer->at = origin->size - kept;
	}
	CHECK_EQUAL(transfer->at + kept, origin->size);
}

ssize_t transfer_step(struct transfer *transfer)
{
	bool in_memory = sink_in_memory(&transfer->sink);
	int64_t off_in = (int64_t)transfer->at;
	int64_t off_out = (int64_t)(transfer->sink.start + transfer->sink.taken);
	int64_t was_in = off_in, was_out = off_out;
	struct rsplice_result result, untouched;
	ssize_t done;
	int error;

	memset(&untouched, 0xa5, sizeof(untouched));
	result = untouched;
	if (around_calls)
		around_calls(true);
	done = call(transfer, transfer->origin.seekable && !transfer->positions ? &off_in : NULL,
		    in_memory && !transfer->positions ? &off_out : NULL, &result);
	error = errno;
	if (around_calls)
		around_calls(false);
	check_arrived(transfer, done > 0 ? (size_t)done : 0);
	check_positions(transfer);
	if (done >= 0) {
		CHECK((size_t)done <= transfer->len);
		CHECK_EQUAL(bytes_of(&result), done);
		CHECK(!result.pad);
		CHECK(!result.copied == !result.why);
		transfer->total = sum(&transfer->total, &result);
	} else {
		CHECK(!memcmp(&result, &untouched, sizeof(result)));
		CHECK(error > 0);
		errno = error;
		CHECK(transfer->may_fail && transfer->may_fail(transfer, error));
		transfer->errors++;
	}
	if (!transfer->positions) {
		CHECK_EQUAL(off_in - was_in, done > 0 && transfer->origin.seekable ? done : 0);
		CHECK_EQUAL(off_out - was_out, done > 0 && in_memory ? done : 0);
	}
	check_kept(transfer, done < 0);
	transfer->ended = !done;
	return done < 0 ? -error : done;
}

static bool all_arrived(const struct transfer *transfer)
{
	const struct origin *origin = &transfer->origin;

	return transfer->at >= origin->size && (transfer->ended || !origin->ends);
}

void transfer_finish(struct transfer *transfer)
{
	unsigned int calls = 0;

	while (!all_arrived(transfer)) {
		/* A call that neither fails nor moves a byte would be one too many. */
		CHECK(calls++ < 100000);
		if (transfer_step(transfer) == 0)
			CHECK(transfer->at >= transfer->origin.size);
	}
}

void transfer_end(struct transfer *transfer)
{
	rsplice_discard(transfer->origin.fd);
	CHECK_EQUAL(rsplice_pending(transfer->origin.fd), 0);
	origin_close(&transfer->origin);
	sink_close(&transfer->sink);
}
