/*-------------------------------------------------------------------------
 *
 * key.h
 *	  The stored form of a key.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_KEY_H
#define STATBUFFER_KEY_H

#include "access/tupdesc.h"
#include "compat.h"
#include "nodes/execnodes.h"
#include "fmgr.h"

/* maximum size of the stored form of a key */
#define KEY_MAX_SIZE		2000

/* Space for a stored form, and for the null bitmap before it */
typedef union KeySpace
{
	char		data[KEY_MAX_SIZE + 256];
	int64		force_align;
} KeySpace;

/* flag in the length of a stored form: a null bitmap precedes the values */
#define KEY_HAS_NULLS		0x8000
#define KEY_LENGTH(len)		((len) & ~KEY_HAS_NULLS)

typedef struct KeyBytes
{
	const char *data;
	uint16		len;			/* with KEY_HAS_NULLS */
	uint32		hash;
} KeyBytes;

/*
 * Converts the argument of an SQL function, or the columns of a table, into
 * the columns of a key.
 */
typedef struct KeyReader KeyReader;

extern void key_form(TupleDesc desc, const char *relname, Datum *values,
					 bool *isnull, KeySpace *space, KeyBytes *key);
extern bool key_is_one_text(TupleDesc desc);
extern void key_form_text(Datum value, KeySpace *space, KeyBytes *key);
extern uint32 key_hash(const char *data, uint16 len);
extern void key_deform(TupleDesc desc, const char *data, uint16 len,
					   Datum *values, bool *isnull);
extern void key_deform_in_place(TupleDesc desc, const char *data, uint16 len,
								Datum *values, bool *isnull);
extern text *key_out(TupleDesc desc, const char *data, uint16 len);

extern KeyReader *key_reader_make(TupleDesc desc, const char *relname,
								  Oid argtype);
extern KeyReader *key_reader_make_columns(TupleDesc desc, const char *relname,
										  const Oid *types,
										  const int32 *typmods);
extern bool key_assignment_is_immutable(Form_pg_attribute att, Oid argtype,
										int32 argtypmod);
extern bool key_reader_runs_code(KeyReader *reader);
extern void key_read(KeyReader *reader, Datum arg, bool argnull,
					 Datum *values, bool *isnull);
extern void key_read_columns(KeyReader *reader, Datum *values, bool *isnull);

/* Detoast a text if it is compressed or toasted. */
static inline struct varlena *
key_get_text(Datum value)
{
	struct varlena *text = (struct varlena *) DatumGetPointer(value);

	if (unlikely(VARATT_IS_COMPRESSED(text) || VARATT_IS_EXTERNAL(text)))
		text = pg_detoast_datum_packed(text);
	return text;
}

/* Is this the stored form that key_form_text() would form from the value? */
static inline bool
key_is_text(const char *data, Datum value)
{
	struct varlena *text = key_get_text(value);
	Size		len = VARSIZE_ANY_EXHDR(text);

	return VARSIZE_ANY_EXHDR(data) == len &&
		memcmp(VARDATA_ANY(data), VARDATA_ANY(text), len) == 0;
}

extern void key_sort(TupleDesc desc, const Datum *values, const bool *isnull,
					 int nkeys, int *sorted, bool *same);

#endif							/* STATBUFFER_KEY_H */
