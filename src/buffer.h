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
#include "nodes/parsenodes.h"
#include "storage/lock.h"
#include "utils/inval.h"
#include "utils/relcache.h"

struct PendingBuffer;

/*
 * How keys of a buffer are formed and read.  It does not change once it is
 * made, but for the names of columns and whether they are NOT NULL.  When the
 * buffer gets another one, the old one stays to the end of the transaction,
 * for those who work with it while code of users runs; whoever keeps something
 * longer that was made for a shape compares `version'.
 */
typedef struct BufferShape
{
	uint64		version;		/* no two have the same in a process */
	MemoryContext context;		/* it lives in */
	TupleDesc	desc;			/* the key columns */
	AttrNumber *key_attnos;		/* where they are in the relation */
	AttrNumber	count_attno;
	bool		is_text;		/* key_is_one_text() */
	KeyShape   *keys;			/* by which keys are the same, and can be read */

	/* the relations of the row types that occur in the keys */
	int			nrow_types;
	Oid		   *row_types;
} BufferShape;

/*
 * A buffer as this backend knows it.  What is in it is good from
 * buffer_open() to the end of the transaction, or until the transaction
 * itself alters the relation, which clears `valid'.  The struct stays to the
 * end of the transaction in any case, and as long as the relation does.
 *
 * From buffer_open() on, the relation is locked, and the relations of its row
 * types in AccessShareLock: other sessions cannot alter them.
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

	/* a user who may increment; InvalidOid: not known */
	Oid			incrementer;

	/* the shared part, once it is attached to */
	SharedBuffer *shared;
	CounterTable table;
	SharedBuffer *table_of;		/* to which the table belongs */

	/* for pending.c: what the transaction has added; NULL outside */
	struct PendingBuffer *pending;
	struct PendingBuffer *pending_space;	/* kept for the next one */

	MemoryContext options_context;
} SbBuffer;

/*
 * While code of users runs that could alter what is in use: what keeps this
 * session from doing so, as a scan of a table does.
 */
typedef struct BufferUse
{
	Relation	rel;
	Relation   *row_types;
	int			nrow_types;
} BufferUse;

/* Takes a lock to the end of the transaction, as LockRelationOid() does. */
typedef void (*BufferLocker) (Oid relid, LOCKMODE lockmode);

/*
 * Changes whenever what was found out before may not hold any more: a
 * relation, type, function, cast, role or privilege was altered, or a
 * subtransaction was rolled back.  Whoever keeps anything from one call to the
 * next, keeps this number with it.
 */
extern uint64 buffer_generation;

/*
 * Before what was found out in an earlier call is used again: take in what
 * other sessions have altered or revoked.  A statement may run for long, and
 * PostgreSQL itself looks only when a statement or a lock begins.
 */
static inline void
buffer_accept_changes(void)
{
	static uint64 last = 0;

	if (clock_moment_passed(&last))
		AcceptInvalidationMessages();
}

extern void buffer_init(void);
extern int	buffer_updatable(Relation rel);
extern void buffer_check_privilege(Oid relid, AclMode mode);
extern void buffer_check_owner(Oid relid);
extern bool buffer_is_incrementer(Oid relid, Oid userid);
extern void buffer_note_incrementer(SbBuffer *buffer, Oid userid,
									uint64 asked);
extern SbBuffer *buffer_open(Oid relid, LOCKMODE lockmode);
extern SbBuffer *buffer_open_locked(Oid relid, BufferLocker lock);
extern void buffer_set_relation_tag(LOCKTAG *tag, Oid relid);
extern void buffer_set_gate_tag(LOCKTAG *tag, Oid relid);
extern void buffer_begin_use(SbBuffer *buffer, BufferUse *use);
extern void buffer_end_use(BufferUse *use);
extern bool buffer_revalidate(SbBuffer *buffer);
extern bool buffer_attach(SbBuffer *buffer, bool create);
extern void buffer_attach_worker(SbBuffer *buffer);
extern void buffer_check_settled(SbBuffer *buffer);
extern void buffer_check_running(SbBuffer *buffer);
extern void buffer_check_shape(SbBuffer *buffer, const BufferShape *shape);
extern void buffer_get_settings(const SbBuffer *buffer,
								BufferSettings *settings);

#endif							/* STATBUFFER_BUFFER_H */
