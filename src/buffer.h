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

#include "clock.h"
#include "key.h"
#include "options.h"
#include "shape.h"
#include "registry.h"
#include "sink.h"
#include "nodes/parsenodes.h"
#include "storage/lock.h"
#include "utils/inval.h"
#include "utils/relcache.h"

struct PendingBuffer;

/*
 * How the keys of a buffer are formed and read.  Once built, a shape does not
 * change, except for the names of columns and whether they are NOT NULL.  When
 * the buffer gets another shape, the old one is kept to the end of the
 * transaction, for callers that are using it while user code runs.  Code that
 * keeps something made for a shape for longer must compare `version'.
 */
typedef struct BufferShape
{
	struct SbBuffer *buffer;	/* whose shape it is, or was */
	uint64		version;		/* unique within the process */
	MemoryContext context;		/* that holds this struct */
	TupleDesc	desc;			/* the key columns */
	AttrNumber *key_attnos;		/* their numbers in the relation */
	AttrNumber	count_attno;
	NameData	count_name;
	bool		is_text;		/* key_is_one_text() */
	KeyShape   *keys;			/* decides which keys are equal, and readable */

	/* relations of the row types that occur in the keys */
	int			nrow_types;
	Oid		   *row_types;
} BufferShape;

/*
 * A buffer as this backend knows it.  The contents are valid from
 * buffer_open() to the end of the transaction, or until the transaction itself
 * alters the relation, which clears `valid'.  The struct itself lives as long
 * as the relation, and in any case to the end of the transaction.
 *
 * After buffer_open(), the relation is locked, and the relations of its row
 * types are locked in AccessShareLock, so other sessions cannot alter them.
 */
typedef struct SbBuffer
{
	Oid			relid;			/* hash key, must be first */
	bool		valid;

	NameData	name;
	Oid			owner;
	bool		created;		/* by this transaction */
	BufferShape *shape;			/* NULL: not read yet */
	BufferOptions options;

	/* durable.c: what the ledger has of it; no context: not read yet */
	List	   *epochs;
	MemoryContext epochs_context;

	/* a user known to have the INSERT privilege, or InvalidOid */
	Oid			incrementer;

	/* the shared part, once attached */
	SharedBuffer *shared;
	bool		in_force;		/* its settings are, as far as we may tell */
	CounterTable table;
	SharedBuffer *table_of;		/* the owner of `table' */

	/* pending.c: what the transaction has added, or NULL */
	struct PendingBuffer *pending;
	struct PendingBuffer *pending_space;	/* reused */

	MemoryContext options_context;
} SbBuffer;

/*
 * Open relations that keep this session from altering a buffer while user code
 * runs, as an open scan does for a table.
 */
typedef struct BufferUse
{
	Relation	rel;
	Relation   *row_types;
	int			nrow_types;
} BufferUse;

/* A shape that keys of a buffer have, and that is not its present one. */
typedef struct OlderShape
{
	KeyShape   *keys;
	TupleDesc	desc;			/* NULL: the keys cannot be read */
	Relation   *row_types;		/* open, as in BufferUse */
	int			nrow_types;
} OlderShape;

/* Takes a lock to the end of the transaction, as LockRelationOid() does. */
typedef void (*BufferLocker) (Oid relid, LOCKMODE lockmode);

/*
 * Changes whenever cached information may have become invalid: a relation,
 * type, function, cast, role or privilege was altered, or a subtransaction was
 * rolled back.  Anything that is cached from one call to the next must be
 * stored along with this number, and discarded when it differs.
 */
extern uint64 buffer_generation;

/*
 * Accept invalidation messages, so that cached information is not used after
 * other sessions have altered or revoked something.  Call this before using
 * anything cached by an earlier call: a statement may run for a long time, and
 * PostgreSQL itself accepts messages only at the start of a statement or when
 * it takes a lock.
 */
static inline void
buffer_accept_changes(void)
{
	static uint64 last = 0;

	if (clock_moment_passed(&last))
		AcceptInvalidationMessages();
}

/*
 * Is an open buffer attached to its shared part as it now is, for callers that
 * are about to count?  The worker may have replaced the table or removed
 * shapes, and loading the saved file may have added some.
 */
static inline bool
buffer_is_attached(const SbBuffer *buffer)
{
	const SharedBuffer *shared = buffer->shared;

	return shared != NULL && buffer->in_force &&
		buffer->table.number == shared->table.number &&
		buffer->table.shapes_number == shared->table.shapes_number &&
		buffer->table.shape < TABLE_SHAPES;
}

extern void buffer_init(void);
extern int	buffer_updatable(Relation rel);
extern bool buffer_is_relation(Relation rel);
extern AttrNumber buffer_find_count(Relation rel, const char **problem);
extern void buffer_describe(Relation rel, const BufferOptions *options,
							SinkSource *source);
extern void buffer_check_privilege(Oid relid, AclMode mode);
extern void buffer_check_owner(Oid relid);
extern SbBuffer *buffer_open(Oid relid, LOCKMODE lockmode);
extern SbBuffer *buffer_open_locked(Oid relid, BufferLocker lock);
extern SbBuffer *buffer_open_to_count(Oid relid, bool check_privilege);
extern void buffer_lock_for_transaction(Oid relid, LOCKMODE lockmode);
extern void buffer_set_relation_tag(LOCKTAG *tag, Oid relid);
extern void buffer_set_gate_tag(LOCKTAG *tag, Oid relid);
extern void buffer_begin_use(SbBuffer *buffer, BufferUse *use);
extern void buffer_end_use(BufferUse *use);
extern void buffer_open_older(const SbBuffer *buffer, int number,
							  BufferLocker lock, OlderShape *older);
extern void buffer_close_older(OlderShape *older);
extern bool buffer_revalidate(SbBuffer *buffer);
extern bool buffer_attach(SbBuffer *buffer, bool create);
extern bool buffer_attach_for_key(SbBuffer *buffer, const KeyBytes *key);
extern bool buffer_look_up(SbBuffer *buffer);
extern void buffer_attach_worker(SbBuffer *buffer);
extern void buffer_check_settled(SbBuffer *buffer);
extern void buffer_check_running(SbBuffer *buffer);
extern void buffer_check_shape(SbBuffer *buffer, const BufferShape *shape);
extern void buffer_get_settings(const SbBuffer *buffer,
								BufferSettings *settings);
extern bool buffer_read_settings(Relation rel, BufferSettings *settings);
extern void buffer_get_source(const SbBuffer *buffer, SinkSource *source);

#endif							/* STATBUFFER_BUFFER_H */
