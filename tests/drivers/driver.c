// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static const char usage[] =
	"usage: driver OPERATION [-n COUNT] [-s SIZE] [-a OFFSET] [-f SOURCE]\n"
	"              [-t DESTINATION] [-d DIRECTORY] [-o REPORT] [-C COMM]\n"
	"              [-F move,gift,zerocopy,trunc,peek,async,sqpoll,defer] [-W]\n"
	"       driver list\n"
	"Makes exactly COUNT (23) calls of SIZE (16384) bytes and says what it\n"
	"did as JSON. SOURCE, DESTINATION: file, direct, memfd, pipe, fifo, tcp,\n"
	"udp, unix, unixgram, alg, or the path of a device. -W: waits for the end\n"
	"of standard input first. Exit status 77: this kernel cannot do that.\n";

static const struct operation *const groups[] = {
	file_operations, splice_operations, socket_operations,
	ring_operations, memory_operations, process_operations,
};

#define GROUPS (sizeof(groups) / sizeof(groups[0]))

static const struct operation *find(const char *name)
{
	for (size_t i = 0; i < GROUPS; i++)
		for (const struct operation *op = groups[i]; op->name; op++)
			if (!strcmp(op->name, name))
				return op;
	return NULL;
}

static void list(void)
{
	for (size_t i = 0; i < GROUPS; i++)
		for (const struct operation *op = groups[i]; op->name; op++)
			puts(op->name);
}

static __attribute__((noreturn)) void misused(void)
{
	fputs(usage, stderr);
	exit(2);
}

static unsigned int parse_flags(char *text)
{
	char *const names[] = {(char *)"move",	 (char *)"gift",  (char *)"zerocopy",
			       (char *)"trunc",	 (char *)"peek",  (char *)"async",
			       (char *)"sqpoll", (char *)"defer", NULL};
	unsigned int flags = 0;
	char *value;

	while (*text) {
		int i = getsubopt(&text, names, &value);

		if (i < 0)
			misused();
		flags |= 1U << i;
	}
	return flags;
}

static void wait_for_end(void)
{
	char byte;

	if (read(STDIN_FILENO, &byte, 1) != 0)
		fail("standard input");
}

int main(int argc, char **argv)
{
	struct options options = {.count = 23, .size = 16384, .directory = "."};
	const struct operation *op = argc > 1 ? find(argv[1]) : NULL;
	bool wait = false;
	int account = -1;
	int option;

	if (argc == 2 && !strcmp(argv[1], "list")) {
		list();
		return 0;
	}
	if (!op)
		misused();
	optind = 2;
	while ((option = getopt(argc, argv, "n:s:a:f:t:d:o:F:C:Wi:")) != -1) {
		switch (option) {
		case 'n':
			options.count = atol(optarg);
			break;
		case 's':
			options.size = strtoul(optarg, NULL, 0);
			break;
		case 'a':
			options.offset = atol(optarg);
			break;
		case 'f':
			options.from = optarg;
			break;
		case 't':
			options.to = optarg;
			break;
		case 'd':
			options.directory = optarg;
			break;
		case 'o':
			options.output = optarg;
			break;
		case 'F':
			options.flags = parse_flags(optarg);
			break;
		case 'C':
			prctl(PR_SET_NAME, optarg, 0, 0, 0);
			break;
		case 'W':
			wait = true;
			break;
		case 'i':
			account = atoi(optarg);
			break;
		default:
			misused();
		}
	}
	if (options.count < 1 || !options.size || options.size > BUFFER_SIZE)
		misused();
	if (!options.from)
		options.from = op->from;
	if (!options.to)
		options.to = op->to;
	account_open(account);
	if (wait)
		wait_for_end();
	op->run(op, &options);
	report(options.output);
	return 0;
}
