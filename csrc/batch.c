/* SPDX-License-Identifier: MIT */
/* Many requests by one call. */
#include "internal.h"

static void carry_out(struct rsplice_request *request, unsigned int flags)
{
	request->result = (struct rsplice_result){0};
	request->ret = rsplice(request->fd_in, request->off_in < 0 ? NULL : &request->off_in,
			       request->fd_out, request->off_out < 0 ? NULL : &request->off_out,
			       request->len, flags, &request->result);
	if (request->ret < 0)
		request->ret = -errno;
}

int rsplice_batch(struct rsplice_request *requests, unsigned int nr, unsigned int flags)
{
	unsigned int i, good = 0;

	if (nr && !requests) {
		errno = EINVAL;
		return -1;
	}
	for (i = 0; i < nr; i++) {
		carry_out(&requests[i], flags);
		good += requests[i].ret >= 0;
	}
	return (int)good;
}
