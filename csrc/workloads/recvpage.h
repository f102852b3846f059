/* SPDX-License-Identifier: MIT */
/*
 * recvpage: pages of a file that arrive over a stream socket, and go into the page cache of a
 * filesystem. A block server, and the caching filesystem that is its client.
 */
#ifndef RSPLICE_WORKLOADS_RECVPAGE_H
#define RSPLICE_WORKLOADS_RECVPAGE_H

#include <stdint.h>

/* cdef begin */
/* What the server does wrong in the answer to a READ: for tests of its client. */
enum recvpage_fault {
	RECVPAGE_NO_FAULT,
	RECVPAGE_CUT,	       /* the connection ends in mid-payload */
	RECVPAGE_STALL,	       /* nothing more comes, and the connection stays open */
	RECVPAGE_DRIP,	       /* a byte now and then */
	RECVPAGE_DIE,	       /* the process exits in mid-payload */
	RECVPAGE_SHORT_LENGTH, /* one byte less than there is, and said so */
	RECVPAGE_LONG_LENGTH,  /* more bytes said than asked for */
	RECVPAGE_WRONG_SIZE,   /* the file said to end a byte before its end */
	RECVPAGE_WRONG_ID,     /* the answer to another request */
	RECVPAGE_WRONG_FILE,   /* the pages of another file */
	RECVPAGE_WRONG_OFFSET, /* other pages of the file */
	RECVPAGE_WRONG_STATUS, /* one that the protocol does not know */
	RECVPAGE_WRONG_MAGIC,  /* no answer at all */
	RECVPAGE_TRAILING      /* a byte behind the answer */
};

struct recvpage_server {
	int listener;	       /* a stream socket that listens */
	int stop;	       /* makes the server return once it is readable */
	const char *directory; /* whose regular files are served */
	int fault;	       /* enum recvpage_fault */
	uint64_t fault_after;  /* payload bytes of the answer before it, if in mid-payload */
	uint64_t fault_skip;   /* READs that are answered well before the first */
	uint64_t fault_count;  /* READs that are answered wrongly */
};

/* Calls that carried bytes, by what they returned. */
struct recvpage_tally {
	uint64_t operations;
	uint64_t bytes;
};

struct recvpage_served {
	struct recvpage_tally recvfrom; /* of requests, into memory */
	struct recvpage_tally sendto;	/* of answers, out of memory */
	struct recvpage_tally sendfile; /* of payload, out of files */
	uint64_t faults;
};

/* Serves until server->stop is readable. Counts meanwhile. Returns 0 or -errno. */
int recvpage_serve(const struct recvpage_server *server, struct recvpage_served *served);

struct recvpage_mount {
	const char *mountpoint; /* an existing directory */
	const char *path;	/* of the server's unix socket; NULL: TCP over the loopback */
	uint16_t port;		/* of TCP */
	int stop;		/* makes the filesystem unmount and return once it is readable */
	int copy;		/* 1: recv and write; 0: rsplice_fuse_reply() */
	unsigned int threads;	/* that take requests */
	uint32_t max_read;	/* bytes of the largest READ, 1 MiB at most */
	uint32_t timeout_ms;	/* for one request of the kernel, with all retries */
	uint32_t retries;	/* over new connections, after an answer that was cut or wrong */
};

struct recvpage_counts {
	uint64_t ready;		/* 1 once mounted */
	uint64_t replies;	/* to READs, with data */
	uint64_t payload;	/* bytes in them */
	uint64_t errors;	/* READs that were answered with one */
	uint64_t gone;		/* READs that the kernel no longer waited for */
	uint64_t connections;	/* made */
	uint64_t retries;	/* of requests, over another connection */
	uint64_t timeouts;	/* requests that ran out of time */
	uint64_t invalidations; /* of a file's pages, because it has changed */
	uint64_t kept;		/* opens that kept the pages there were */
	/* replies to everything but READ, and notices, without their headers */
	struct recvpage_tally control;
	struct recvpage_tally requests; /* sent to the server */
	struct recvpage_tally answers;	/* received from it: headers and listings */
	struct recvpage_tally received; /* payload of READs, into memory */
	uint64_t moved;			/* struct rsplice_result, summed */
	uint64_t shared;
	uint64_t direct;
	uint64_t copied;
	uint64_t unknown;
	uint64_t why;
};

/*
 * Mounts the server's files, read-only, and serves until unmounted, until mount->stop is readable,
 * or until SIGINT, SIGTERM or SIGHUP where not ignored; unmounts. Counts meanwhile. Returns 0 or
 * -errno, of which recvpage_message() says more.
 */
int recvpage_mount(const struct recvpage_mount *mount, struct recvpage_counts *counts);

/* Why the last recvpage_mount() failed, as one clause; "" if it did not. */
const char *recvpage_message(void);
/* cdef end */

#endif /* RSPLICE_WORKLOADS_RECVPAGE_H */
