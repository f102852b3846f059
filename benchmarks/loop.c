// SPDX-License-Identifier: MIT
/*
 * loop [-r ROUNDS] [-R CALLS_PER_S] [-o FILE] MODE:SIZE:PAIRS...
 *
 * Makes exactly ROUNDS x PAIRS pairs of calls for each MODE and says how long a pair took:
 *   splice   splice(file -> pipe), splice(pipe -> /dev/null), SIZE bytes each
 *   copy     pread(file), pwrite(file), SIZE bytes each
 *   getppid  two calls that carry nothing
 * Its files lie unlinked in TMPDIR. Exit status 0, or 1 with a line on standard error.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { FILE_SIZE = 1 << 20, PACED_PAIRS = 50, NAME_MAX_LEN = 16 };

struct files {
	int input, output, null, pipe[2];
	char *buffer;
};

struct spec {
	char name[NAME_MAX_LEN];
	size_t size;
	long pairs;
	void (*pair)(const struct files *, size_t, loff_t);
	const char *calls[2];
};

static void splice_pair(const struct files *f, size_t size, loff_t at)
{
	if (splice(f->input, &at, f->pipe[1], NULL, size, 0) != (ssize_t)size ||
	    splice(f->pipe[0], NULL, f->null, NULL, size, 0) != (ssize_t)size)
		err(1, "splice of %zu bytes", size);
}

static void copy_pair(const struct files *f, size_t size, loff_t at)
{
	if (pread(f->input, f->buffer, size, at) != (ssize_t)size ||
	    pwrite(f->output, f->buffer, size, at) != (ssize_t)size)
		err(1, "pread and pwrite of %zu bytes", size);
}

static void getppid_pair(const struct files *f, size_t size, loff_t at)
{
	(void)f, (void)size, (void)at;
	syscall(SYS_getppid);
	syscall(SYS_getppid);
}

static const struct spec known[] = {
	{"splice", 0, 0, splice_pair, {"splice", NULL}},
	{"copy", 0, 0, copy_pair, {"pread64", "pwrite64"}},
	{"getppid", 0, 0, getppid_pair, {"getppid", NULL}},
};

static struct spec parse(const char *text)
{
	char name[NAME_MAX_LEN];
	size_t size;
	long pairs;

	if (sscanf(text, "%15[a-z]:%zu:%ld", name, &size, &pairs) != 3 || pairs < 0 ||
	    size > FILE_SIZE)
		errx(1, "%s: not MODE:SIZE:PAIRS with a SIZE of at most %d", text, FILE_SIZE);
	for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++) {
		if (strcmp(known[i].name, name) == 0) {
			struct spec spec = known[i];

			spec.size = size;
			spec.pairs = pairs;
			return spec;
		}
	}
	errx(1, "%s: the modes are splice, copy and getppid", name);
}

static int scratch_file(void)
{
	const char *directory = getenv("TMPDIR");
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/loop.XXXXXX", directory ? directory : "/tmp");
	fd = mkstemp(path);
	if (fd < 0)
		err(1, "%s", path);
	unlink(path);
	return fd;
}

static struct files open_files(void)
{
	struct files f = {.input = scratch_file(), .output = scratch_file()};

	f.null = open("/dev/null", O_WRONLY);
	f.buffer = malloc(FILE_SIZE);
	if (f.null < 0 || f.buffer == NULL || pipe(f.pipe) < 0)
		err(1, "cannot open /dev/null and a pipe");
	memset(f.buffer, 'r', FILE_SIZE);
	if (write(f.input, f.buffer, FILE_SIZE) != FILE_SIZE ||
	    write(f.output, f.buffer, FILE_SIZE) != FILE_SIZE)
		err(1, "cannot fill the scratch files");
	return f;
}

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void sleep_until_ns(double due)
{
	struct timespec t = {.tv_sec = (time_t)(due / 1e9)};

	t.tv_nsec = (long)(due - (double)t.tv_sec * 1e9);
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

/* Nanoseconds per pair of one round; with a rate the pauses are part of them. */
static double run_round(const struct spec *spec, const struct files *f, long rate)
{
	size_t range = spec->size ? FILE_SIZE / spec->size * spec->size : 1;
	size_t at = 0;
	double start = now_ns();

	for (long i = 0; i < spec->pairs; i++) {
		spec->pair(f, spec->size, (loff_t)at);
		at += spec->size;
		if (at >= range)
			at = 0;
		if (rate && i % PACED_PAIRS == PACED_PAIRS - 1)
			sleep_until_ns(start + (double)(i + 1) * 2e9 / (double)rate);
	}
	return (now_ns() - start) / (double)(spec->pairs ? spec->pairs : 1);
}

static void run(FILE *out, const struct spec *spec, const struct files *f, int rounds, long rate)
{
	long pairs = spec->pairs * rounds;

	fprintf(out, "{\"mode\": \"%s\", \"size\": %zu, \"pairs\": %ld, \"calls\": {", spec->name,
		spec->size, pairs);
	if (spec->calls[1])
		fprintf(out, "\"%s\": %ld, \"%s\": %ld", spec->calls[0], pairs, spec->calls[1],
			pairs);
	else
		fprintf(out, "\"%s\": %ld", spec->calls[0], 2 * pairs);
	fprintf(out, "}, \"ns_per_pair\": [");
	for (int r = 0; r < rounds; r++)
		fprintf(out, "%s%.1f", r ? ", " : "", run_round(spec, f, rate));
	fprintf(out, "]}");
}

int main(int argc, char **argv)
{
	int rounds = 1, option;
	long rate = 0;
	FILE *out = stdout;

	while ((option = getopt(argc, argv, "r:R:o:")) != -1) {
		if (option == 'r')
			rounds = atoi(optarg);
		else if (option == 'R')
			rate = atol(optarg);
		else if (option == 'o')
			out = fopen(optarg, "w");
		else
			return 1;
	}
	if (out == NULL)
		err(1, "cannot write the result");
	if (optind == argc || rounds < 1 || rate < 0)
		errx(1, "usage: loop [-r ROUNDS] [-R CALLS_PER_S] [-o FILE] MODE:SIZE:PAIRS...");

	struct files f = open_files();

	fprintf(out, "{\"runs\": [");
	for (int i = optind; i < argc; i++) {
		struct spec spec = parse(argv[i]);

		run(out, &spec, &f, rounds, rate);
		fprintf(out, i + 1 < argc ? ",\n" : "]}\n");
	}
	if (fclose(out) != 0)
		err(1, "cannot write the result");
	return 0;
}
