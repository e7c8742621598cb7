/*-------------------------------------------------------------------------
 *
 * buffer.h
 *	  What a buffer is: shape, options, owner.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_BUFFER_H
#define STATBUFFER_BUFFER_H

#include "counters.h"
#include "key.h"
#include "nodes/pg_list.h"
#include "shared.h"
#include "storage/lockdefs.h"

/* a day is long enough to wait for something that is running */
#define SHUTDOWN_MAX_MSECS	(24 * 60 * 60 * 1000)

typedef struct BufferOptions
{
	char	   *handler;
	int			interval;		/* times are in milliseconds */
	int			jitter;
	int			timeout;
	int			backoff;
	bool		temporary;		/* restart 'temporary' */
	int			shutdown;
	int			batch_size;
	int			handler_timeout;
	bool		stopped;
} BufferOptions;

struct PendingBuffer;

/*
 * A buffer as this backend knows it.  What is in it is good from
 * buffer_open() to the end of the transaction, or until the transaction
 * itself alters the relation, which clears `valid'.  The struct is there as
 * long as the relation is, or is counted in.  `version'
 * changes with the shape; who keeps something made for `desc' remembers it.
 */
typedef struct SbBuffer
{
	Oid			relid;			/* hash key, must be first */
	bool		valid;
	uint32		version;

	NameData	name;
	Oid			owner;
	TupleDesc	desc;			/* the key columns */
	AttrNumber *key_attnos;		/* where they are in the relation */
	AttrNumber	count_attno;
	bool		is_text;		/* key_is_one_text() */
	uint64		shape;
	bool		has_rows;		/* row types occur in the keys */
	BufferOptions options;

	/* a user who may increment; InvalidOid: not known */
	Oid			incrementer;

	/* the shared part, once it is attached to */
	SharedBuffer *shared;
	CounterTable table;
	SharedBuffer *table_of;		/* to which the table belongs */

	/* for pending.c: what the transaction has added; NULL outside */
	struct PendingBuffer *pending;
	struct PendingBuffer *pending_space;	/* kept for the next one */

	MemoryContext shape_context;
	MemoryContext options_context;
} SbBuffer;

extern void buffer_init(void);
extern void buffer_note_change(Oid classId, Oid objectId);
extern bool buffer_is_incrementer(Oid relid, Oid userid);
extern uint64 buffer_ask_privileges(void);
extern void buffer_note_incrementer(SbBuffer *buffer, Oid userid,
									uint64 asked);
extern SbBuffer *buffer_open(Oid relid, LOCKMODE lockmode);
extern bool buffer_revalidate(SbBuffer *buffer);
extern bool buffer_attach(SbBuffer *buffer, bool create);
extern void buffer_check_settled(SbBuffer *buffer);
extern void buffer_check_running(SbBuffer *buffer);
extern TimestampTz buffer_count_time(SbBuffer *buffer, TimestampTz now);
extern TimestampTz buffer_due_time(SbBuffer *buffer, TimestampTz counted_at);
extern void buffer_parse_options(List *options, BufferOptions *result);

#endif							/* STATBUFFER_BUFFER_H */
