/*-------------------------------------------------------------------------
 *
 * handler.h
 *	  The user's function that stores counts.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_HANDLER_H
#define STATBUFFER_HANDLER_H

#include "access/tupdesc.h"

/* A key, as it is handed over. */
typedef struct HandlerKey
{
	Datum	   *values;
	bool	   *isnull;
	int64		count;			/* never 0 */
} HandlerKey;

typedef struct Handler Handler;

/* Called before each call, with the keys that it is for. */
typedef void (*HandlerProgress) (int first_key, int nkeys, void *arg);

extern Oid	handler_find(const char *name, TupleDesc desc, bool *takes_arrays);
extern void handler_check(const char *name, TupleDesc desc, Oid owner);
extern Handler *handler_prepare(const char *name, TupleDesc desc, Oid owner);
extern void handler_call(Handler *handler, HandlerKey *keys, int nkeys,
						 HandlerProgress progress, void *arg);

#endif							/* STATBUFFER_HANDLER_H */
