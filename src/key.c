/*-------------------------------------------------------------------------
 *
 * key.c
 *	  A key's stored form: from datums to bytes and back, conversion of
 *	  arguments, text output, and the order of keys.
 *
 * The stored form is the data part of a heap tuple of the key columns, with
 * every value flat and uncompressed, so that equal input gives equal bytes.
 * If there are nulls, their bitmap precedes it, padded to MAXALIGN, and the
 * length has KEY_HAS_NULLS set.
 *
 * This room knows nothing of buffers or shared memory.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "executor/executor.h"
#include "funcapi.h"
#include "key.h"
#include "nodes/makefuncs.h"
#include "optimizer/optimizer.h"
#include "parser/parse_coerce.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/sortsupport.h"
#include "utils/typcache.h"

/* from this many keys on, sort them by abbreviations */
#define ABBREVIATE_MIN		32

/* Converts a value of one type to a value of a key column. */
typedef struct KeyCast
{
	ExprState  *state;			/* NULL if the value needs no conversion */
	ExprContext *econtext;
} KeyCast;

struct KeyReader
{
	TupleDesc	desc;
	const char *relname;
	MemoryContext context;		/* for the casts of a row's fields */
	Oid			argtype;
	bool		is_row;			/* a row, whose fields are the key columns */

	/* text, which the input function of the column, or of rows, reads */
	bool		is_text;
	FmgrInfo	input;
	Oid			ioparam;
	int32		typmod;

	/*
	 * The casts of the columns.  Those for the fields of a row are valid for
	 * fields of types `argtypes', which must be compared with the types of
	 * each row: a row type may be altered from one call to the next.
	 */
	bool		has_casts;		/* for a row: the casts are valid */
	Oid		   *argtypes;
	KeyCast    *casts;
};

/* How the values of a key column are ordered. */
typedef struct ColumnOrder
{
	SortSupportData sort;		/* comparator NULL: compare bytes */
	bool		byval;
	int16		len;
} ColumnOrder;

/* Keys that are being sorted: see key_sort(). */
typedef struct KeySorting
{
	int			ncolumns;
	const Datum *values;
	const bool *isnull;
	bool		abbreviated;	/* SortItem.first is an abbreviation */
	ColumnOrder columns[FLEXIBLE_ARRAY_MEMBER];
} KeySorting;

/* One of them.  What most comparisons need is here. */
typedef struct SortItem
{
	Datum		first;			/* the first column, or an abbreviation of it */
	int			key;			/* number of the key */
	bool		isnull;			/* the first column is null */
} SortItem;

/* ------------------------------------------------------------------------
 * Stored forms
 * ------------------------------------------------------------------------
 */

/* Compute the hash of a stored form. */
uint32
key_hash(const char *data, uint16 len)
{
	if (unlikely(KEY_LENGTH(len) == 0))
		return 0;
	return key_hash_parts(data[0], data + 1, KEY_LENGTH(len) - 1) ^
		(len & KEY_HAS_NULLS);
}

static inline void
finish_key(const char *data, uint16 len, KeyBytes *key)
{
	key->data = data;
	key->len = len;
	key->hash = key_hash(data, len);
}

static void
report_too_long(Size size)
{
	ereport(ERROR,
			(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
			 errmsg("key is too long"),
			 errdetail("Its stored form takes %zu bytes; up to %d are possible.",
					   size, KEY_MAX_SIZE),
			 errhint("Use a digest of the value as the key.")));
}

static Datum flatten(Form_pg_attribute att, Datum value, bool to_store);

/*
 * Can values of this type contain rows?  All row types, and arrays of them,
 * have this alignment, and few other types do.
 */
static inline bool
may_have_rows(Form_pg_attribute att)
{
	return att->attlen == -1 && att->attalign == TYPALIGN_DOUBLE;
}

/*
 * Form a row anew.  A row that comes from a table has the tuple's visibility
 * information in its header, and its fields may be compressed.
 *
 * With `to_store', the version of the row type is cleared.  So what is counted
 * before and after the type is altered has the same key if the shape is the
 * same.  Without, a stored row is turned into a row of the present type, with
 * that type's version and all its fields.  That the stored row is of an older
 * version does not matter, because the shapes have been compared.
 */
static Datum
normalize_row(Datum value, bool to_store)
{
	HeapTupleHeader row;
	TupleDesc	desc;
	HeapTupleData tuple;
	Datum	   *values;
	bool	   *isnull;

	check_stack_depth();
	CHECK_FOR_INTERRUPTS();

	if (to_store)
		row = DatumGetHeapTupleHeader(value);
	else
		row = (HeapTupleHeader) PG_DETOAST_DATUM(value);
	desc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(row),
								  HeapTupleHeaderGetTypMod(row));
	tuple.t_len = HeapTupleHeaderGetDatumLength(row);
	ItemPointerSetInvalid(&tuple.t_self);
	tuple.t_tableOid = InvalidOid;
	tuple.t_data = row;
	values = palloc(desc->natts * sizeof(Datum));
	isnull = palloc(desc->natts * sizeof(bool));
	heap_deform_tuple(&tuple, desc, values, isnull);
	for (int i = 0; i < desc->natts; i++)
	{
		if (TupleDescAttr(desc, i)->attisdropped)
			isnull[i] = true;
		if (!isnull[i])
			values[i] = flatten(TupleDescAttr(desc, i), values[i], to_store);
	}
	value = HeapTupleGetDatum(heap_form_tuple(desc, values, isnull));
	if (to_store)
		compat_clear_row_version((HeapTupleHeader) DatumGetPointer(value));
	ReleaseTupleDesc(desc);
	return value;
}

/* Likewise, for an array of rows. */
static Datum
normalize_array(Datum value, bool to_store)
{
	ArrayType  *array = DatumGetArrayTypeP(value);
	Datum	   *elements;
	bool	   *isnull;
	int			nelements;

	deconstruct_array(array, ARR_ELEMTYPE(array), -1, false,
					  TYPALIGN_DOUBLE, &elements, &isnull, &nelements);
	for (int i = 0; i < nelements; i++)
		if (!isnull[i])
			elements[i] = normalize_row(elements[i], to_store);
	return PointerGetDatum(construct_md_array(elements, isnull,
											  ARR_NDIM(array), ARR_DIMS(array),
											  ARR_LBOUND(array),
											  ARR_ELEMTYPE(array), -1, false,
											  TYPALIGN_DOUBLE));
}

/* Convert a value to the canonical form in which it is stored, or back. */
static Datum
flatten(Form_pg_attribute att, Datum value, bool to_store)
{
	if (att->attlen != -1)
		return value;

	/* use a short header if the column's storage allows it */
	if (att->attstorage == TYPSTORAGE_PLAIN)
		value = PointerGetDatum(PG_DETOAST_DATUM(value));
	else
		value = PointerGetDatum(PG_DETOAST_DATUM_PACKED(value));
	if (may_have_rows(att))
	{
		Oid			type = getBaseType(att->atttypid);
		Oid			element;

		if (type_is_rowtype(type))
			value = normalize_row(value, to_store);
		else if (OidIsValid(element = get_element_type(type)) &&
				 type_is_rowtype(element))
			value = normalize_array(value, to_store);
	}
	return value;
}

/* Is the key one column of type text, whose values may have short headers? */
bool
key_is_one_text(TupleDesc desc)
{
	return desc->natts == 1 &&
		TupleDescAttr(desc, 0)->atttypid == TEXTOID &&
		TupleDescAttr(desc, 0)->attstorage != TYPSTORAGE_PLAIN;
}

/*
 * A faster key_form() for a single column of type text that is not null.
 * Raises an error if the stored form is too long.
 */
void
key_form_text(Datum value, KeySpace *space, KeyBytes *key)
{
	Size		len;
	const char *text = key_get_text(value, &len);
	Size		header;

	if (len + VARHDRSZ > KEY_MAX_SIZE)
		report_too_long(len + VARHDRSZ);
	if (len <= KEY_SHORT_TEXT)
	{
		header = VARHDRSZ_SHORT;
		space->data[0] = key_text_header(len);
	}
	else
	{
		header = VARHDRSZ;
		SET_VARSIZE(space->data, len + header);
	}

	/*
	 * Use memmove() because gcc, which knows the maximum length of a key,
	 * turns memcpy() into a string instruction, which takes longer to start
	 * than copying most keys.
	 */
	memmove(space->data + header, text, len);
	finish_key(space->data, len + header, key);
}

/*
 * Form the stored form of a key in `space'.  Modifies `values'.
 *
 * Raises an error if a column that is NOT NULL is null, or if the stored form
 * is too long.
 */
void
key_form(TupleDesc desc, const char *relname, Datum *values, bool *isnull,
		 KeySpace *space, KeyBytes *key)
{
	bool		hasnulls = false;
	Size		bitmap_size = 0;
	Size		size;
	uint16		infomask = 0;

	if (key_is_one_text(desc) && !isnull[0])
	{
		key_form_text(values[0], space, key);
		return;
	}

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (isnull[i])
		{
			if (att->attnotnull)
				ereport(ERROR,
						(errcode(ERRCODE_NOT_NULL_VIOLATION),
						 errmsg("null value in key column \"%s\" of buffer \"%s\" violates not-null constraint",
								NameStr(att->attname), relname)));
			hasnulls = true;
		}
		else
			values[i] = flatten(att, values[i], true);
	}

	size = heap_compute_data_size(desc, values, isnull);
	if (size > KEY_MAX_SIZE)
		report_too_long(size);
	if (hasnulls)
		bitmap_size = MAXALIGN(BITMAPLEN(desc->natts));
	/* clear padding, of which a single column has none */
	if (hasnulls || desc->natts > 1)
		memset(space->data, 0, bitmap_size + size);
	heap_fill_tuple(desc, values, isnull, space->data + bitmap_size, size,
					&infomask, hasnulls ? (uint8 *) space->data : NULL);

	finish_key(space->data,
			   (bitmap_size + size) | (hasnulls ? KEY_HAS_NULLS : 0), key);
}

/*
 * Extract the columns from a stored form whose shape can be read under that of
 * `desc'.  The datums point into memory of the current context.
 */
void
key_deform(TupleDesc desc, const char *data, uint16 len, Datum *values,
		   bool *isnull)
{
	bool		hasnulls = (len & KEY_HAS_NULLS) != 0;
	Size		bitmap_size = 0;
	Size		size = KEY_LENGTH(len);
	Size		hoff = SizeofHeapTupleHeader;
	HeapTupleData tuple;
	HeapTupleHeader header;

	if (hasnulls)
	{
		bitmap_size = MAXALIGN(BITMAPLEN(desc->natts));
		hoff += BITMAPLEN(desc->natts);
	}
	hoff = MAXALIGN(hoff);
	size -= bitmap_size;
	Assert(COMPAT_IS_FINALIZED(desc));

	header = palloc0(hoff + size);
	HeapTupleHeaderSetNatts(header, desc->natts);
	header->t_infomask = HEAP_HASVARWIDTH | (hasnulls ? HEAP_HASNULL : 0);
	header->t_hoff = hoff;
	if (hasnulls)
		memcpy(header->t_bits, data, BITMAPLEN(desc->natts));
	memcpy((char *) header + hoff, data + bitmap_size, size);

	tuple.t_len = hoff + size;
	ItemPointerSetInvalid(&tuple.t_self);
	tuple.t_tableOid = InvalidOid;
	tuple.t_data = header;
	heap_deform_tuple(&tuple, desc, values, isnull);

	for (int i = 0; i < desc->natts; i++)
		if (!isnull[i] && may_have_rows(TupleDescAttr(desc, i)))
			values[i] = flatten(TupleDescAttr(desc, i), values[i], false);
}

/*
 * Likewise, but the datums may also point into the stored form, which must be
 * aligned for int and stay as it is.
 */
void
key_deform_in_place(TupleDesc desc, const char *data, uint16 len,
					Datum *values, bool *isnull)
{
	if (!key_is_one_text(desc) || (len & KEY_HAS_NULLS) != 0)
	{
		key_deform(desc, data, len, values, isnull);
		return;
	}
	values[0] = PointerGetDatum(data);
	isnull[0] = false;
}

/*
 * Convert a stored form to text: the output of the column or, if there are
 * several, of a row.  Returns NULL for a single null.  Runs output functions.
 */
text *
key_out(TupleDesc desc, const char *data, uint16 len)
{
	Datum	   *values = palloc(desc->natts * sizeof(Datum));
	bool	   *isnull = palloc(desc->natts * sizeof(bool));
	Datum		value;
	Oid			type;
	Oid			output;
	bool		is_varlena;

	key_deform(desc, data, len, values, isnull);
	if (desc->natts == 1)
	{
		if (isnull[0])
			return NULL;
		value = values[0];
		type = TupleDescAttr(desc, 0)->atttypid;
	}
	else
	{
		value = HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc),
												  values, isnull));
		type = RECORDOID;
	}
	getTypeOutputInfo(type, &output, &is_varlena);
	return cstring_to_text(OidOutputFunctionCall(output, value));
}

/* ------------------------------------------------------------------------
 * Reading arguments
 * ------------------------------------------------------------------------
 */

/*
 * Are values of a type assigned to a key column as they are?  If this is not
 * known at once, returns false; then make_cast() finds out.
 */
static inline bool
is_of_type(Form_pg_attribute att, Oid argtype, int32 argtypmod)
{
	return argtype == att->atttypid &&
		(att->atttypmod < 0 || att->atttypmod == argtypmod);
}

/*
 * Build the expression that assigns a value of a type, for which a placeholder
 * stands, to a key column.  Returns NULL if that is not possible.  `argtypmod'
 * is the value's typmod, or -1 if unknown.  With `by_text', the value's text is
 * read by the column's input function.
 */
static Node *
assignment_to(Form_pg_attribute att, Oid argtype, int32 argtypmod,
			  bool by_text)
{
	CaseTestExpr *placeholder = makeNode(CaseTestExpr);
	Node	   *expr;

	placeholder->typeId = argtype;
	placeholder->typeMod = argtypmod;
	placeholder->collation = get_typcollation(argtype);

	if (argtype == UNKNOWNOID || by_text)
	{
		CoerceViaIO *io = makeNode(CoerceViaIO);

		io->arg = (Expr *) placeholder;
		io->resulttype = att->atttypid;
		io->resultcollid = InvalidOid;
		io->coerceformat = COERCE_IMPLICIT_CAST;
		io->location = -1;
		expr = (Node *) io;
		if (att->atttypmod >= 0)
			expr = coerce_to_target_type(NULL, expr, att->atttypid,
										 att->atttypid, att->atttypmod,
										 COERCION_ASSIGNMENT,
										 COERCE_IMPLICIT_CAST, -1);
	}
	else
		expr = coerce_to_target_type(NULL, (Node *) placeholder, argtype,
									 att->atttypid, att->atttypmod,
									 COERCION_ASSIGNMENT,
									 COERCE_IMPLICIT_CAST, -1);
	return expr;
}

/*
 * Does the assignment of a value of this type to a key column have the same
 * result whatever the session's settings are?  Also true if it cannot be
 * assigned at all.
 */
bool
key_assignment_is_immutable(Form_pg_attribute att, Oid argtype,
							int32 argtypmod)
{
	return is_of_type(att, argtype, argtypmod) ||
		!contain_mutable_functions(assignment_to(att, argtype, argtypmod,
												 false));
}

/*
 * Prepare the assignment of a value to a key column.  If there is no cast for
 * it, that is an error, unless `or_text' allows to read the value's text.
 * See assignment_to().
 */
static void
make_cast(KeyReader *reader, Form_pg_attribute att, Oid argtype,
		  int32 argtypmod, bool or_text, KeyCast *cast)
{
	Node	   *expr;

	cast->state = NULL;
	cast->econtext = NULL;
	if (is_of_type(att, argtype, argtypmod))
		return;
	expr = assignment_to(att, argtype, argtypmod, false);
	if (expr == NULL && or_text)
		expr = assignment_to(att, argtype, argtypmod, true);
	if (expr == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("key column \"%s\" of buffer \"%s\" is of type %s but the key is of type %s",
						NameStr(att->attname), reader->relname,
						format_type_be(att->atttypid),
						format_type_be(argtype)),
				 errhint("You will need to cast the key.")));

	if (IsA(expr, CaseTestExpr) ||
		(IsA(expr, RelabelType) &&
		 IsA(((RelabelType *) expr)->arg, CaseTestExpr)))
		return;
	cast->state = ExecInitExpr(expression_planner((Expr *) expr), NULL);
	cast->econtext = CreateStandaloneExprContext();
}

static Datum
apply_cast(KeyCast *cast, Datum value, bool *isnull)
{
	if (cast->state == NULL)
		return value;

	ResetExprContext(cast->econtext);
	cast->econtext->caseValue_datum = value;
	cast->econtext->caseValue_isNull = *isnull;
	return ExecEvalExprSwitchContext(cast->state, cast->econtext, isnull);
}

/* Raise the error that the key is not a row, as it must be. */
static void
report_not_row(const KeyReader *reader)
{
	ereport(ERROR,
			(errcode(ERRCODE_DATATYPE_MISMATCH),
			 errmsg("buffer \"%s\" has %d key columns", reader->relname,
					reader->desc->natts),
			 errhint("Specify the key as a row, ROW(...), or as the text form of a row, '(...)'.")));
}

/*
 * Create a reader for key arguments of a type, in the current memory context.
 * Raises an error if the type cannot be converted to a key.
 */
KeyReader *
key_reader_make(TupleDesc desc, const char *relname, Oid argtype)
{
	KeyReader  *reader = palloc0(sizeof(KeyReader));
	Form_pg_attribute att = TupleDescAttr(desc, 0);

	reader->desc = desc;
	reader->relname = relname;
	reader->argtype = argtype;
	reader->argtypes = palloc0(desc->natts * sizeof(Oid));
	reader->casts = palloc0(desc->natts * sizeof(KeyCast));

	/*
	 * The fields of a row are the key columns, unless the row itself is the
	 * value of the only one.
	 */
	reader->is_row = type_is_rowtype(argtype) &&
		!(desc->natts == 1 && argtype == att->atttypid);

	/* drivers pass parameters as text: the text form of a row will do */
	if (desc->natts > 1 && argtype == TEXTOID)
	{
		reader->is_row = true;
		reader->is_text = true;
		fmgr_info(F_RECORD_IN, &reader->input);
		reader->ioparam = RECORDOID;
		reader->typmod = BlessTupleDesc(desc)->tdtypmod;
	}

	if (reader->is_row)
	{
		reader->context = AllocSetContextCreate(CurrentMemoryContext,
												"statbuffer row reader",
												ALLOCSET_SMALL_SIZES);
		return reader;
	}

	if (desc->natts > 1)
		report_not_row(reader);

	/* a key column of type text needs no input function */
	if (argtype == TEXTOID && att->atttypid != TEXTOID)
	{
		Oid			input;

		reader->is_text = true;
		getTypeInputInfo(att->atttypid, &input, &reader->ioparam);
		fmgr_info(input, &reader->input);
		reader->typmod = att->atttypmod;
	}
	else
		make_cast(reader, att, argtype, -1, false, &reader->casts[0]);
	return reader;
}

/*
 * Create a reader that assigns columns of these types to the key columns, one
 * to one: see key_read_columns().  Otherwise like key_reader_make().
 */
KeyReader *
key_reader_make_columns(TupleDesc desc, const char *relname, const Oid *types,
						const int32 *typmods)
{
	KeyReader  *reader = palloc0(sizeof(KeyReader));

	reader->desc = desc;
	reader->relname = relname;
	reader->casts = palloc0(desc->natts * sizeof(KeyCast));
	for (int i = 0; i < desc->natts; i++)
		make_cast(reader, TupleDescAttr(desc, i), types[i], typmods[i], false,
				  &reader->casts[i]);
	return reader;
}

/*
 * Create a reader that converts keys of as many other columns, one to one, with
 * key_read_columns(): as an assignment would, or if there is no cast for that,
 * by their text.  Otherwise like key_reader_make().
 */
KeyReader *
key_reader_make_conversion(TupleDesc desc, const char *relname, TupleDesc from)
{
	KeyReader  *reader = palloc0(sizeof(KeyReader));

	Assert(from->natts == desc->natts);
	reader->desc = desc;
	reader->relname = relname;
	reader->casts = palloc0(desc->natts * sizeof(KeyCast));
	for (int i = 0; i < desc->natts; i++)
		make_cast(reader, TupleDescAttr(desc, i),
				  TupleDescAttr(from, i)->atttypid, -1, true,
				  &reader->casts[i]);
	return reader;
}

/* Does the reader run casts or input functions, which can do anything? */
bool
key_reader_runs_code(KeyReader *reader)
{
	if (reader->is_row || reader->is_text)
		return true;
	for (int i = 0; i < reader->desc->natts; i++)
		if (reader->casts[i].state != NULL)
			return true;
	return false;
}

/*
 * Ensure that there are casts for the fields of a row type.  Raises an error
 * if their number differs from that of the key columns, or if they cannot be
 * assigned to them.
 */
static void
match_fields(KeyReader *reader, TupleDesc rowdesc)
{
	TupleDesc	desc = reader->desc;
	bool		same = reader->has_casts;
	int			nfields = 0;
	MemoryContext oldcontext;

	for (int i = 0; i < rowdesc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(rowdesc, i);

		if (att->attisdropped)
			continue;
		if (nfields < desc->natts)
			same &= reader->argtypes[nfields] == att->atttypid;
		nfields++;
	}
	if (nfields != desc->natts)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("number of fields of the key does not match the key columns of buffer \"%s\"",
						reader->relname),
				 errdetail("Fields: %d. Key columns: %d.", nfields,
						   desc->natts)));
	if (same)
		return;

	/* reset memory here: each call may pass rows of another type */
	reader->has_casts = false;
	MemoryContextReset(reader->context);
	oldcontext = MemoryContextSwitchTo(reader->context);
	nfields = 0;
	for (int i = 0; i < rowdesc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(rowdesc, i);

		if (att->attisdropped)
			continue;
		reader->argtypes[nfields] = att->atttypid;
		make_cast(reader, TupleDescAttr(desc, nfields), att->atttypid, -1,
				  false, &reader->casts[nfields]);
		nfields++;
	}
	MemoryContextSwitchTo(oldcontext);
	reader->has_casts = true;
}

/* Read the fields of a row into the key columns. */
static void
read_row(KeyReader *reader, Datum arg, Datum *values, bool *isnull)
{
	HeapTupleHeader row = DatumGetHeapTupleHeader(arg);
	TupleDesc	rowdesc;
	HeapTupleData tuple;
	Datum	   *row_values;
	bool	   *row_isnull;
	int			column = 0;

	/*
	 * The descriptor is refcounted, so it stays valid whatever the casts do
	 * to the type.
	 */
	rowdesc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(row),
									 HeapTupleHeaderGetTypMod(row));
	match_fields(reader, rowdesc);

	tuple.t_len = HeapTupleHeaderGetDatumLength(row);
	ItemPointerSetInvalid(&tuple.t_self);
	tuple.t_tableOid = InvalidOid;
	tuple.t_data = row;
	row_values = palloc(rowdesc->natts * sizeof(Datum));
	row_isnull = palloc(rowdesc->natts * sizeof(bool));
	heap_deform_tuple(&tuple, rowdesc, row_values, row_isnull);

	for (int i = 0; i < rowdesc->natts; i++)
	{
		if (TupleDescAttr(rowdesc, i)->attisdropped)
			continue;
		isnull[column] = row_isnull[i];
		values[column] = apply_cast(&reader->casts[column], row_values[i],
									&isnull[column]);
		column++;
	}
	ReleaseTupleDesc(rowdesc);
}

/* Read the text form of a row.  Raises an error if it is none. */
static Datum
read_row_text(KeyReader *reader, char *string)
{
	if (string[strspn(string, " \t\n\r\f\v")] != '(')
		report_not_row(reader);
	return InputFunctionCall(&reader->input, string, reader->ioparam,
							 reader->typmod);
}

/*
 * Read an argument into the key columns.  The datums are valid until the next
 * call.  Raises an error for a null instead of a row, and the errors of casts
 * and input functions.
 */
void
key_read(KeyReader *reader, Datum arg, bool argnull, Datum *values,
		 bool *isnull)
{
	if (reader->is_row)
	{
		if (argnull)
			ereport(ERROR,
					(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
					 errmsg("key of buffer \"%s\" must not be null",
							reader->relname),
					 errhint("Specify a null in a key column as a field of the row.")));
		if (reader->is_text)
			arg = read_row_text(reader, TextDatumGetCString(arg));
		read_row(reader, arg, values, isnull);
	}
	else if (reader->is_text)
	{
		char	   *string = argnull ? NULL : TextDatumGetCString(arg);

		/* input functions of domains also check nulls */
		isnull[0] = argnull;
		values[0] = (Datum) 0;
		if (!argnull || !reader->input.fn_strict)
			values[0] = InputFunctionCall(&reader->input, string,
										  reader->ioparam, reader->typmod);
	}
	else
	{
		isnull[0] = argnull;
		values[0] = apply_cast(&reader->casts[0], arg, &isnull[0]);
	}
}

/*
 * Convert values of columns to those of the key columns, in place.  The datums
 * are valid until the next call.  Raises the errors of casts.
 */
void
key_read_columns(KeyReader *reader, Datum *values, bool *isnull)
{
	for (int i = 0; i < reader->desc->natts; i++)
		values[i] = apply_cast(&reader->casts[i], values[i], &isnull[i]);
}

/* ------------------------------------------------------------------------
 * Order
 * ------------------------------------------------------------------------
 */

/* Determine how the values of a column are ordered. */
static void
prepare_column(ColumnOrder *column, Form_pg_attribute att, bool abbreviate)
{
	TypeCacheEntry *type;

	type = lookup_type_cache(att->atttypid,
							 TYPECACHE_LT_OPR | TYPECACHE_CMP_PROC);
	column->byval = att->attbyval;
	column->len = att->attlen;
	column->sort.ssup_cxt = CurrentMemoryContext;
	column->sort.ssup_collation = att->attcollation;
	column->sort.abbreviate = abbreviate;
	if (OidIsValid(type->lt_opr) && OidIsValid(type->cmp_proc))
		PrepareSortSupportFromOrderingOp(type->lt_opr, &column->sort);
}

static int
compare_images(const ColumnOrder *column, Datum a, Datum b)
{
	Size		size_a = datumGetSize(a, column->byval, column->len);
	Size		size_b = datumGetSize(b, column->byval, column->len);
	int			cmp;

	if (column->byval)
		return a < b ? -1 : (a > b ? 1 : 0);
	cmp = memcmp(DatumGetPointer(a), DatumGetPointer(b), Min(size_a, size_b));
	if (cmp != 0)
		return cmp;
	return size_a < size_b ? -1 : (size_a > size_b ? 1 : 0);
}

/* Compare keys by one of their columns. */
static int
compare_column(KeySorting *sorting, int i, int key_a, int key_b)
{
	ColumnOrder *column = &sorting->columns[i];
	Size		a = (Size) key_a * sorting->ncolumns + i;
	Size		b = (Size) key_b * sorting->ncolumns + i;
	const Datum *values = sorting->values;
	const bool *isnull = sorting->isnull;

	if (i == 0 && sorting->abbreviated)
		return ApplySortAbbrevFullComparator(values[a], isnull[a],
											 values[b], isnull[b],
											 &column->sort);
	if (column->sort.comparator != NULL)
		return ApplySortComparator(values[a], isnull[a], values[b], isnull[b],
								   &column->sort);
	if (isnull[a] || isnull[b])
		return (int) isnull[a] - (int) isnull[b];
	return compare_images(column, values[a], values[b]);
}

/* Compare keys whose first columns, or abbreviations of these, are equal. */
static pg_noinline int
compare_rest(const SortItem *a, const SortItem *b, KeySorting *sorting)
{
	int			i = 0;

	/* are they known to be equal? */
	if (!sorting->abbreviated && sorting->columns[0].sort.comparator != NULL)
		i = 1;
	for (; i < sorting->ncolumns; i++)
	{
		int			cmp = compare_column(sorting, i, a->key, b->key);

		if (cmp != 0)
			return cmp;
	}
	return 0;
}

static inline int
compare_items(const SortItem *a, const SortItem *b, KeySorting *sorting)
{
	SortSupport sort = &sorting->columns[0].sort;

	if (likely(sort->comparator != NULL))
	{
		int			cmp = ApplySortComparator(a->first, a->isnull, b->first,
											  b->isnull, sort);

		if (cmp != 0)
			return cmp;
	}
	return compare_rest(a, b, sorting);
}

#define ST_SORT sort_items
#define ST_ELEMENT_TYPE SortItem
#define ST_COMPARE(a, b, sorting) compare_items(a, b, sorting)
#define ST_COMPARE_ARG_TYPE KeySorting
#define ST_CHECK_FOR_INTERRUPTS
#define ST_SCOPE static
#define ST_DEFINE
#include "lib/sort_template.h"

/* Do without abbreviations.  The first `n' items have some. */
static void
stop_abbreviating(KeySorting *sorting, SortItem *items, int n)
{
	SortSupport sort = &sorting->columns[0].sort;

	sorting->abbreviated = false;
	sort->comparator = sort->abbrev_full_comparator;
	for (int i = 0; i < n; i++)
		items[i].first = sorting->values[(Size) i * sorting->ncolumns];
}

/*
 * Make the items, in the order of the keys.  As in tuplesort.c, the type
 * decides now and then whether abbreviations are worth it.
 */
static void
make_items(KeySorting *sorting, SortItem *items, int nkeys)
{
	SortSupport sort = &sorting->columns[0].sort;
	int			next_look = ABBREVIATE_MIN;

	sorting->abbreviated = sort->abbrev_converter != NULL;
	for (int i = 0; i < nkeys; i++)
	{
		Size		first = (Size) i * sorting->ncolumns;

		if (sorting->abbreviated && i == next_look)
		{
			next_look *= 2;
			if (sort->abbrev_abort(i, sort))
				stop_abbreviating(sorting, items, i);
		}
		items[i].key = i;
		items[i].isnull = sorting->isnull[first];
		items[i].first = sorting->values[first];
		if (sorting->abbreviated && !items[i].isnull)
			items[i].first = sort->abbrev_converter(items[i].first, sort);
	}
}

/*
 * Sort keys by the default order of each column's type, which also defines
 * equality.  Types without an order are ordered by their bytes.  Nulls are
 * equal, and sort last.
 *
 * `values' and `isnull' have the columns of all keys, one key after the other.
 * Stores the numbers of the keys, in order, in `sorted', and in `same' whether
 * each is equal to the one before it.
 */
void
key_sort(TupleDesc desc, const Datum *values, const bool *isnull, int nkeys,
		 int *sorted, bool *same)
{
	KeySorting *sorting = palloc0(offsetof(KeySorting, columns) +
								  desc->natts * sizeof(ColumnOrder));
	SortItem   *items = palloc_extended(nkeys * sizeof(SortItem),
										MCXT_ALLOC_HUGE);

	sorting->ncolumns = desc->natts;
	sorting->values = values;
	sorting->isnull = isnull;
	for (int i = 0; i < desc->natts; i++)
		prepare_column(&sorting->columns[i], TupleDescAttr(desc, i),
					   i == 0 && nkeys >= ABBREVIATE_MIN);
	make_items(sorting, items, nkeys);
	sort_items(items, nkeys, sorting);
	for (int i = 0; i < nkeys; i++)
	{
		sorted[i] = items[i].key;
		same[i] = i > 0 &&
			compare_items(&items[i - 1], &items[i], sorting) == 0;
	}
	pfree(items);
}
