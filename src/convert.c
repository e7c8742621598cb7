/*-------------------------------------------------------------------------
 *
 * convert.c
 *	  Converting the keys that a buffer holds when its key columns are altered.
 *
 * A key that was counted before has an older shape (see shape.c), under which
 * nobody counts any more.  Each value of it is converted to its column's present
 * type as an assignment would, and its count is moved to the key that this
 * gives.  A key that cannot be converted stays as it is.
 *
 * A count is moved as a whole, by an atomic step that cannot fail, and until
 * then nothing is changed.  There are two occasions:
 *
 * - A statement that alters the columns converts what is held when it is done,
 *	 under AccessExclusiveLock.  So nobody sees anything in between.  If the
 *	 (sub)transaction is rolled back, its callback moves the counts back.
 *
 * - The worker converts what is left: if the session had not loaded the library,
 *	 if counts were loaded later from the saved file, if the transaction was
 *	 prepared, and if memory was out.  It holds no lock that keeps others from
 *	 counting and reading.  To these, a count that is not converted yet is not
 *	 there; then it is.  What the worker has moved stays moved, unless the
 *	 buffer is durable: then it is moved in the ledger, too, and comes back if
 *	 the transaction fails.
 *
 * Conversions run code of users, as the buffer's owner.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "convert.h"
#include "counters.h"
#include "durable.h"
#include "miscadmin.h"
#include "owner.h"
#include "storage/lmgr.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"

/*
 * A key that is converted.  The counter of `from' is pinned from the beginning,
 * that of `to' when it is known; then the count is moved, once.
 */
typedef struct KeyMove
{
	CounterRef	from;
	CounterPin	to;				/* no counter: not converted */
	MovedCount	moved;
	bool		is_moved;
} KeyMove;

/*
 * The keys of a buffer that are being converted, and those that were and may
 * have to be moved back.  Whatever is pinned is in `moves'.  In
 * TopTransactionContext.
 */
typedef struct Conversion
{
	SharedBuffer *shared;
	int			level;			/* nesting level of the subtransaction */
	bool		undoable;
	bool		in_ledger;		/* they were moved in the ledger, too */
	NameData	name;			/* of the buffer */
	KeyMove    *moves;
	uint64		nmoves;
	uint64		size;
} Conversion;

/* An older shape, and how its keys are converted. */
typedef struct Converter
{
	bool		is_open;
	OlderShape	older;
	const char *problem;		/* why its keys cannot be converted, or NULL */
	KeyReader  *reader;			/* NULL: not made, or an error has come up */
	MemoryContext context;		/* of the reader */
} Converter;

/* The conversion that is going on. */
typedef struct ConvertState
{
	SbBuffer   *buffer;
	const BufferShape *shape;
	CounterTable table;
	Conversion *conversion;
	BufferLocker lock;
	ConvertFailed failed;		/* or NULL */
	void	   *arg;
	ConvertResult *result;
	MemoryContext key_context;	/* reset for each key */
	Converter	converters[TABLE_SHAPES];
} ConvertState;

static List *conversions = NIL; /* in TopTransactionContext; outer ones first */

/* ------------------------------------------------------------------------
 * The end of the transaction
 * ------------------------------------------------------------------------
 */

/* Release the pins of a key, if any.  Takes no lock, cannot fail. */
static void
release_move(Conversion *conversion, KeyMove *move)
{
	if (move->from.counter == NULL)
		return;
	counters_unpin(conversion->shared, &move->to);
	counter_unpin(move->from.counter);
	move->from.counter = NULL;
}

/*
 * A conversion is over.  With `undo', moves the counts back.  Takes no lock,
 * cannot fail.
 */
static void
end_conversion(Conversion *conversion, bool undo)
{
	while (conversion->nmoves > 0)
	{
		KeyMove    *move = &conversion->moves[--conversion->nmoves];

		if (undo && move->is_moved)
			counters_move_back(conversion->shared, move->from, move->to.ref,
							   &move->moved);
		release_move(conversion, move);
	}
}

/* The same for all conversions from this nesting level on, the last one first. */
static void
end_conversions(int level, bool undo)
{
	while (conversions != NIL)
	{
		Conversion *last = llast(conversions);

		if (last->level < level)
			break;
		end_conversion(last, undo);
		conversions = list_truncate(conversions, list_length(conversions) - 1);
	}
}

/*
 * The transaction is going to be prepared.  What it has appended to the ledger says
 * that memory has the same when it commits, which will not be so.
 */
static void
check_prepare(void)
{
	ListCell   *lc;

	foreach(lc, conversions)
	{
		Conversion *conversion = lfirst(lc);

		if (conversion->in_ledger && conversion->nmoves > 0)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("cannot PREPARE a transaction that has altered the key columns of buffer \"%s\"",
							NameStr(conversion->name)),
					 errdetail("The buffer is durable, and holds counts.")));
	}
}

static void
xact_callback(XactEvent event, void *arg)
{
	if (likely(conversions == NIL))
		return;
	switch (event)
	{
		case XACT_EVENT_PRE_PREPARE:
			check_prepare();
			return;
		case XACT_EVENT_COMMIT:
			end_conversions(0, false);
			break;
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:

			/*
			 * Who will end a prepared transaction does not know of this: then
			 * the worker converts.
			 */
			end_conversions(0, true);
			break;
		default:
			return;
	}
	conversions = NIL;
}

static void
subxact_callback(SubXactEvent event, SubTransactionId subid,
				 SubTransactionId parent_subid, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();
	ListCell   *lc;

	if (likely(conversions == NIL))
		return;
	if (event == SUBXACT_EVENT_ABORT_SUB)
		end_conversions(level, true);
	else if (event == SUBXACT_EVENT_COMMIT_SUB)
		foreach(lc, conversions)
	{
		Conversion *conversion = lfirst(lc);

		conversion->level = Min(conversion->level, level - 1);
	}
}

/* Set up this room.  Called once, when the module is loaded. */
void
convert_init(void)
{
	RegisterXactCallback(xact_callback, NULL);
	RegisterSubXactCallback(subxact_callback, NULL);
}

/* ------------------------------------------------------------------------
 * Converting
 * ------------------------------------------------------------------------
 */

/* Note that a key cannot be converted, and why. */
static void
fail(ConvertState *state, KeyMove *move, const char *message)
{
	ConvertResult *result = state->result;

	if (result->nfailed++ == 0)
		result->message = pstrdup(message);
	if (state->failed != NULL)
		state->failed(move->from.counter, message, state->arg);
}

/* Get the converter of the shape that a key has, with the shape open. */
static Converter *
open_converter(ConvertState *state, KeyMove *move)
{
	int			number = move->from.counter->shape;
	Converter  *converter = &state->converters[number];

	if (converter->is_open)
		return converter;
	buffer_open_older(state->buffer, number, state->lock, &converter->older);
	converter->is_open = true;
	if (!shape_same_columns(converter->older.keys, state->shape->keys))
		converter->problem = _("key columns were added or dropped");
	else if (converter->older.desc == NULL)
		converter->problem = _("a type of its columns is gone or was altered");
	converter->context = AllocSetContextCreate(CurrentMemoryContext,
											   "statbuffer converter",
											   ALLOCSET_SMALL_SIZES);
	return converter;
}

/*
 * Make a converter's reader, unless it has one.  After an error, what casts have
 * kept in it may be of no use any more.
 */
static void
prepare_reader(ConvertState *state, Converter *converter)
{
	MemoryContext oldcontext;

	if (converter->reader != NULL)
		return;
	MemoryContextReset(converter->context);
	oldcontext = MemoryContextSwitchTo(converter->context);
	converter->reader = key_reader_make_conversion(state->shape->desc,
												   NameStr(state->buffer->name),
												   converter->older.desc);
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Convert a key, and pin the counter of the key that this gives.  Raises an
 * error if that is not possible.
 */
static void
convert_key(ConvertState *state, Converter *converter, KeyMove *move)
{
	SharedCounter *from = move->from.counter;
	SharedBuffer *shared = state->conversion->shared;
	TupleDesc	desc = state->shape->desc;
	int64		count = (int64) pg_atomic_read_u64(&from->count);
	Datum	   *values;
	bool	   *isnull;
	KeySpace	space;
	KeyBytes	key;

	prepare_reader(state, converter);
	MemoryContextReset(state->key_context);
	MemoryContextSwitchTo(state->key_context);
	values = palloc(desc->natts * sizeof(Datum));
	isnull = palloc(desc->natts * sizeof(bool));
	key_deform(converter->older.desc, from->key, from->keylen, values, isnull);
	key_read_columns(converter->reader, values, isnull);
	key_form(desc, NameStr(state->buffer->name), values, isnull, &space, &key);

	counters_pin_held(shared, &state->table, &key, count, &move->to);
}

/* May the error be that of a key?  If not, the conversion ends with it. */
static bool
is_of_key(const ErrorData *edata)
{
	int			category = ERRCODE_TO_CATEGORY(edata->sqlerrcode);

	return edata->elevel == ERROR &&
		category != ERRCODE_OPERATOR_INTERVENTION &&
		category != ERRCODE_TRANSACTION_ROLLBACK;
}

/*
 * Convert keys, from the one with this number on, up to the first one that fails,
 * in a subtransaction.  Returns the number of the next one.
 */
static uint64
convert_some(ConvertState *state, uint64 first)
{
	Conversion *conversion = state->conversion;
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile uint64 i = first;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		for (; i < conversion->nmoves; i++)
		{
			KeyMove    *move = &conversion->moves[i];
			Converter  *converter = &state->converters[move->from.counter->shape];

			CHECK_FOR_INTERRUPTS();
			if (converter->problem == NULL)
				convert_key(state, converter, move);
		}
		MemoryContextSwitchTo(context);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *edata;
		KeyMove    *move = &conversion->moves[i];

		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		CurrentResourceOwner = owner;
		if (i == conversion->nmoves || !is_of_key(edata))
			ReThrowError(edata);
		state->converters[move->from.counter->shape].reader = NULL;
		fail(state, move, edata->message);
		FreeErrorData(edata);
		i++;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return i;
}

/*
 * Convert the keys from the one with this number on, and move their counts.
 * Keeps those that may have to be moved back.
 */
static void
convert_portion(ConvertState *state, uint64 first)
{
	Conversion *conversion = state->conversion;
	uint64		nkept = first;

	for (uint64 i = first; i < conversion->nmoves; i++)
	{
		KeyMove    *move = &conversion->moves[i];
		Converter  *converter = open_converter(state, move);

		if (converter->problem != NULL)
			fail(state, move, converter->problem);
		else
			counters_prepare_to_pin(conversion->shared,
									(int64) pg_atomic_read_u64(&move->from.counter->count));
	}
	for (uint64 i = first; i < conversion->nmoves;)
		i = convert_some(state, i);

	/* what moves counts cannot fail */
	for (uint64 i = first; i < conversion->nmoves; i++)
	{
		KeyMove    *move = &conversion->moves[i];

		if (move->to.ref.counter != NULL)
		{
			counters_move(conversion->shared, move->from, move->to.ref,
						  &move->moved);
			move->is_moved = true;
		}
		if (!move->is_moved || !conversion->undoable)
			release_move(conversion, move);
		else if (nkept++ < i)
		{
			conversion->moves[nkept - 1] = *move;
			move->from.counter = NULL;
			move->is_moved = false;
		}
	}
	conversion->nmoves = nkept;
}

/* Note a key that is to be converted, and pin its counter. */
static void
add_move(Conversion *conversion, CounterRef ref)
{
	KeyMove    *move;

	if (conversion->nmoves == conversion->size)
	{
		uint64		size = conversion->size * 2;

		conversion->moves = repalloc_huge(conversion->moves,
										  size * sizeof(KeyMove));
		conversion->size = size;
	}
	move = &conversion->moves[conversion->nmoves];
	memset(move, 0, sizeof(KeyMove));
	counter_pin(ref.counter);
	move->from = ref;
	conversion->nmoves++;
}

/* Begin a conversion. */
static Conversion *
begin_conversion(SbBuffer *buffer, bool undoable, bool in_ledger)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(TopTransactionContext);
	Conversion *conversion = palloc0(sizeof(Conversion));

	conversion->shared = buffer->shared;
	conversion->level = GetCurrentTransactionNestLevel();
	conversion->undoable = undoable || in_ledger;
	conversion->in_ledger = in_ledger;
	conversion->name = buffer->name;
	conversion->size = 256;
	conversion->moves = palloc(conversion->size * sizeof(KeyMove));
	conversions = lappend(conversions, conversion);
	MemoryContextSwitchTo(oldcontext);
	return conversion;
}

/*
 * Convert all keys that cannot be read.  Goes by portions of the table, because
 * nothing can be converted while a partition is locked.
 */
static void
convert_all(ConvertState *state)
{
	Conversion *conversion = state->conversion;
	TableScan	scan;
	CounterRef	ref;

	table_begin_scan(&scan, &state->table, false);
	while (table_begin_portion(&scan))
	{
		uint64		first = conversion->nmoves;

		while ((ref = table_next(&scan)).counter != NULL)
			if (!table_can_read(&state->table, ref.counter) &&
				pg_atomic_read_u64(&ref.counter->count) != 0)
				add_move(conversion, ref);
		if (conversion->nmoves > first)
			convert_portion(state, first);
		CHECK_FOR_INTERRUPTS();
	}
	for (int i = 0; i < TABLE_SHAPES; i++)
		buffer_close_older(&state->converters[i].older);
}

/*
 * In the ledger of a durable buffer, the counts move as well.  If that fails, or
 * the transaction is rolled back, they are moved back.
 */
static void
append_moves(ConvertState *state)
{
	SbBuffer   *buffer = state->buffer;
	Conversion *conversion = state->conversion;
	LedgerBody *bodies[TABLE_SHAPES] = {NULL};
	LedgerBody *to = palloc(sizeof(LedgerBody));
	LedgerWriter writer;

	if (conversion->nmoves == 0)
		return;
	ledger_begin_body(to, durable_epoch(buffer, state->shape->keys));
	ledger_open_current(&writer, false);
	for (uint64 i = 0; i < conversion->nmoves; i++)
	{
		KeyMove    *move = &conversion->moves[i];
		SharedCounter *counter = move->from.counter;
		SharedCounter *other = move->to.ref.counter;

		Assert(move->is_moved);
		if (bodies[counter->shape] == NULL)
		{
			KeyShape   *shape = table_copy_shape(&conversion->shared->table,
												 counter->shape);

			bodies[counter->shape] = palloc(sizeof(LedgerBody));
			ledger_begin_body(bodies[counter->shape],
							  durable_epoch(buffer, shape));
		}
		ledger_put(&writer, bodies[counter->shape], counter->key,
				   counter->keylen, (int64) (0 - (uint64) move->moved.count));
		ledger_put(&writer, to, other->key, other->keylen, move->moved.count);
	}
	for (int i = 0; i < TABLE_SHAPES; i++)
		if (bodies[i] != NULL)
			ledger_end_body(&writer, bodies[i]);
	ledger_end_body(&writer, to);
	ledger_close(&writer);
}

/* Convert what an open and attached buffer holds. */
static void
convert(SbBuffer *buffer, bool undoable, BufferLocker lock,
		ConvertFailed failed, void *arg, ConvertResult *result)
{
	bool		in_ledger;
	MemoryContext context;
	MemoryContext oldcontext;
	ConvertState *state;
	BufferUse	use;

	memset(result, 0, sizeof(ConvertResult));
	if (!table_has_unreadable(&buffer->shared->table, &buffer->table))
		return;

	/* without a number for the present shape there is no room for keys of it */
	if (buffer->table.shape == TABLE_SHAPES)
		return;
	in_ledger = durable_has_epochs(buffer->relid);
	context = AllocSetContextCreate(CurrentMemoryContext, "statbuffer conversion",
									ALLOCSET_DEFAULT_SIZES);
	oldcontext = MemoryContextSwitchTo(context);
	state = palloc0(sizeof(ConvertState));
	state->buffer = buffer;
	state->shape = buffer->shape;
	state->table = buffer->table;
	state->conversion = begin_conversion(buffer, undoable, in_ledger);
	state->lock = lock;
	state->failed = failed;
	state->arg = arg;
	state->result = result;
	state->key_context = AllocSetContextCreate(context, "statbuffer conversion key",
											   ALLOCSET_SMALL_SIZES);
	buffer_begin_use(buffer, &use);
	PushActiveSnapshot(GetTransactionSnapshot());
	convert_all(state);

	/*
	 * Whatever the option is at this moment: if it is switched off and on
	 * again before the commit, the epochs stay.  Where it is switched on,
	 * what is in memory is appended at the end.
	 */
	if (in_ledger)
		append_moves(state);
	PopActiveSnapshot();
	buffer_end_use(&use);
	MemoryContextSwitchTo(oldcontext);
	if (result->message != NULL)
		result->message = pstrdup(result->message);
	MemoryContextDelete(context);
}

/*
 * The transaction has altered the key columns of an open buffer: convert what it
 * holds.  The caller holds AccessExclusiveLock on it.  If the (sub)transaction is
 * rolled back, everything is as it was.
 */
void
convert_altered(SbBuffer *buffer, ConvertResult *result)
{
	OwnerView	saved;

	memset(result, 0, sizeof(ConvertResult));
	if (!buffer_look_up(buffer))
		return;
	buffer_attach_worker(buffer);

	/* whoever alters it, casts must not be able to do more than the owner */
	owner_enter(buffer->owner, &saved);
	SetUserIdAndSecContext(buffer->owner,
						   saved.sec_context | SECURITY_LOCAL_USERID_CHANGE |
						   SECURITY_RESTRICTED_OPERATION);
	convert(buffer, true, LockRelationOid, NULL, NULL, result);
	owner_leave(&saved);
}

/*
 * Convert what an open and attached buffer holds in keys that cannot be read.  The
 * caller is its worker, in a transaction, and has nothing in flight.  `failed' is
 * called for each key that cannot be converted.
 */
void
convert_rest(SbBuffer *buffer, BufferLocker lock, ConvertFailed failed,
			 void *arg, ConvertResult *result)
{
	convert(buffer, false, lock, failed, arg, result);
}
