/*-------------------------------------------------------------------------
 *
 * sink.h
 *	  Where a batch goes.
 *
 * A sink stores the counts of a batch, within the transaction of the flush: if
 * that is rolled back, nothing may have been stored.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SINK_H
#define STATBUFFER_SINK_H

#include "access/tupdesc.h"
#include "options.h"

/* What a sink knows of the buffer whose counts it stores. */
typedef struct SinkSource
{
	Oid			relid;
	Oid			owner;
	const BufferOptions *options;
	TupleDesc	desc;			/* the key columns */
	const char *count_name;		/* the name of the count column */
} SinkSource;

/* A key as the sink gets it. */
typedef struct SinkKey
{
	Datum	   *values;
	bool	   *isnull;
	int64		count;			/* never 0 */
} SinkKey;

/*
 * A sink calls this before it stores keys, with the ones that it is going to
 * store at once: if that fails, one of them is to blame.  If it returns false,
 * the sink stores neither these nor any that follow.
 */
typedef bool (*SinkProgress) (int first_key, int nkeys, void *arg);

typedef struct Sink Sink;

typedef struct SinkMethods
{
	/*
	 * Raise an error if a worker could not store counts, for sb_start().  The
	 * caller has the owner's user ID and search path: see owner_enter().
	 */
	void		(*check) (const SinkSource *source);

	/*
	 * Prepare to store keys.  Called for each batch.  Raises an error if they
	 * cannot be stored.  The caller is in a transaction with an active
	 * snapshot, as the buffer's owner.  The result is in the current memory
	 * context; it uses `source' as long as it lives.
	 */
	Sink	   *(*prepare) (const SinkSource *source);

	/*
	 * Store keys, which are distinct and sorted by their values.  Returns how
	 * many were stored: all, or the first ones if it was told to stop. Raises
	 * an error if that fails.
	 */
	int			(*deliver) (Sink *sink, SinkKey *keys, int nkeys,
							SinkProgress progress, void *arg);
} SinkMethods;

/* A sink's own struct begins with this. */
struct Sink
{
	const SinkMethods *methods;
};

/* the user's function: sink_function.c */
extern const SinkMethods sink_function;

/* a column of a table: sink_target.c */
extern const SinkMethods sink_target;

extern void sink_make_arrays(TupleDesc desc, const SinkKey *keys, int nkeys,
							 Datum *arrays);

/* Get the sink of a buffer with these options. */
static inline const SinkMethods *
sink_for(const BufferOptions *options)
{
	return options->target != NULL ? &sink_target : &sink_function;
}

#endif							/* STATBUFFER_SINK_H */
