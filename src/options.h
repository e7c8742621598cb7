/*-------------------------------------------------------------------------
 *
 * options.h
 *	  Options of a buffer.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_OPTIONS_H
#define STATBUFFER_OPTIONS_H

#include "nodes/parsenodes.h"

/* upper limit of waiting for running work: a day */
#define SHUTDOWN_MAX_MSECS	(24 * 60 * 60 * 1000)

typedef struct BufferOptions
{
	char	   *target;			/* NULL: the handler stores the counts */
	char	   *handler;		/* NULL: the target takes them */
	bool		durable;
	int			interval;		/* times are in milliseconds */
	int			jitter;
	int			timeout;
	int			backoff;
	bool		temporary;		/* restart 'temporary' */
	int			shutdown;
	int			batch_size;
	int			batch_time;
	int			handler_timeout;
	int			max_memory;		/* in kilobytes; 0: no bound */
	bool		discard;		/* when_full 'discard' */
	bool		stopped;
} BufferOptions;

extern DefElem *options_find(List *options, const char *name);
extern void options_parse(List *options, BufferOptions *result);

#endif							/* STATBUFFER_OPTIONS_H */
