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
extern KeyReader *key_reader_make_conversion(TupleDesc desc,
											 const char *relname,
											 TupleDesc from);
extern bool key_assignment_is_immutable(Form_pg_attribute att, Oid argtype,
										int32 argtypmod);
extern bool key_reader_runs_code(KeyReader *reader);
extern void key_read(KeyReader *reader, Datum arg, bool argnull,
					 Datum *values, bool *isnull);
extern void key_read_columns(KeyReader *reader, Datum *values, bool *isnull);

/*
 * Get the bytes of a text, without its header.  Detoasts it if it is compressed
 * or toasted.
 */
static inline const char *
key_get_text(Datum value, Size *len)
{
	struct varlena *text = (struct varlena *) DatumGetPointer(value);

	if (unlikely(VARATT_IS_COMPRESSED(text) || VARATT_IS_EXTERNAL(text)))
		text = pg_detoast_datum_packed(text);

	if (VARATT_IS_SHORT(text))
	{
		*len = VARSIZE_SHORT(text) - VARHDRSZ_SHORT;
		return (char *) text +VARHDRSZ_SHORT;
	}
	*len = VARSIZE(text) - VARHDRSZ;
	return (char *) text +VARHDRSZ;
}

/* up to this length the stored form of a text has a header of one byte */
#define KEY_SHORT_TEXT		(VARATT_SHORT_MAX - VARHDRSZ_SHORT)

/* The header of such a text. */
static inline char
key_text_header(Size len)
{
	char		header;

	SET_VARSIZE_SHORT(&header, len + VARHDRSZ_SHORT);
	return header;
}

/*
 * Is this the stored form that key_form_text() would form from a text?  Looks
 * at the last byte first: where keys alternate, it often is the one that
 * differs.
 */
static inline bool
key_is_text(const char *data, const char *text, Size len)
{
	const char *stored = data + VARHDRSZ_SHORT;

	if (unlikely(len > KEY_SHORT_TEXT))
		return VARATT_IS_4B_U(data) && VARSIZE(data) - VARHDRSZ == len &&
			memcmp(data + VARHDRSZ, text, len) == 0;
	return data[0] == key_text_header(len) &&
		(len == 0 ||
		 (stored[len - 1] == text[len - 1] &&
		  memcmp(stored, text, len - 1) == 0));
}

/*
 * Compute the hash of a stored form of at least one byte: the first, and `len'
 * that follow it.
 *
 * Tables use the upper bits and the lower ones, so all must depend on each bit
 * of the key.  Most keys are short, and for them this takes half as long as
 * hash_bytes().  Hashes are in shared memory only, so the order of bytes does
 * not matter.
 */
static inline uint32
key_hash_parts(char first, const char *rest, Size len)
{
	const uint64 odd = UINT64CONST(0x9e3779b97f4a7c15);
	uint64		hash = ((uint64) len << 8 | (unsigned char) first) * odd;
	uint64		word = 0;

	for (; len > sizeof(uint64); len -= sizeof(uint64))
	{
		memcpy(&word, rest, sizeof(uint64));
		hash = (hash ^ word) * odd;
		hash ^= hash >> 32;
		rest += sizeof(uint64);
	}

	/* 1 to 8 bytes are left, or none; reading some twice does no harm */
	if (len >= sizeof(uint32))
	{
		uint32		begin;
		uint32		end;

		memcpy(&begin, rest, sizeof(uint32));
		memcpy(&end, rest + len - sizeof(uint32), sizeof(uint32));
		word = (uint64) begin << 32 | end;
	}
	else if (len > 0)
		word = (uint64) (unsigned char) rest[0] << 16 |
			(unsigned char) rest[len / 2] << 8 |
			(unsigned char) rest[len - 1];
	else
		word = 0;

	hash = (hash ^ word) * odd;
	hash = (hash ^ hash >> 32) * odd;
	return (uint32) (hash >> 32) ^ (uint32) hash;
}

extern void key_sort(TupleDesc desc, const Datum *values, const bool *isnull,
					 int nkeys, int *sorted, bool *same);

#endif							/* STATBUFFER_KEY_H */
