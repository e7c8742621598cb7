# Key columns are added, dropped and get other types, while a handler is in the
# middle of a call, and while nobody is at work.  What was counted before is
# converted if the types allow it (see 038_converted.pl).  Otherwise it is kept,
# and only stored as what it was counted: when the columns are as they were.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use DdlTest;
use HandlerTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

# --- key columns ------------------------------------------------------------

# Preloaded, the worker is told when columns are altered.  Otherwise it looks
# again at counts that it could not store when a minute is over, or when
# somebody asks for a flush.
sub have_it_looked_at
{
	my ($name) = @_;

	sql("SELECT sb_flush_all('$name')") if !$preloaded;
	return;
}

sub test_key_columns
{
	my ($gate, $offset);
	my $held = q{SELECT state, pending FROM sb_stat_buffers WHERE relid = '%s'::regclass};

	# Preloaded, that is refused (see sql/define.sql).  A session that has not
	# loaded the library can do it.
	if (!$preloaded)
	{
		# A column more, which also happens to look like a count: what was counted
		# before stays apart, until the column goes again.
		$gate = make_busy('widened');
		run_while_busy('ALTER FOREIGN TABLE widened ADD n bigint NOT NULL DEFAULT 1', $gate);
		wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('failing', 102) FROM (%s) AS s}, sprintf($held, 'widened')),
			"$how, widened: what was counted before is kept, and the buffer fails");
		like(sql(q{SELECT last_error FROM sb_stat_buffers WHERE buffer = 'widened'}),
			qr/before the key columns were altered/, "$how, widened: the view tells why");
		is(sql(q{SELECT count(*) FROM widened}), '0', "$how, widened: it is not to be seen");
		sql(q{
			CREATE FUNCTION widened_store(key text, second bigint, counter bigint) RETURNS void
			LANGUAGE sql AS $$ INSERT INTO widened_calls VALUES (key || '/' || second, counter) $$;
			SELECT sb_increment(ROW('k', 3), 8, 'widened')});
		wait_for_stored($node, $db, 'widened', 13, "$how, widened: what is counted with it is stored");
		sql('ALTER FOREIGN TABLE widened DROP n');
		have_it_looked_at('widened');
		wait_for_stored($node, $db, 'widened', 115, "$how, widened: what was counted before is stored when it is gone");
		is(sql('SELECT key, sum(counter) FROM widened_calls GROUP BY key ORDER BY key'),
			"k|7\nk/3|8\nother|100", "$how, widened: each as what it was counted");
		wait_for($node, $db, q{SELECT state = 'running' FROM sb_stat_buffers WHERE buffer = 'widened'},
			"$how, widened: the buffer works again");
		sql('DROP FOREIGN TABLE widened');

		# A column that makes it no buffer at all.
		$gate = make_busy('misshapen', q{, backoff '100ms'});
		run_while_busy('ALTER FOREIGN TABLE misshapen ADD remark text', $gate);
		wait_for($node, $db, q{
				SELECT state = 'failing' AND pending = 102 AND last_error LIKE '%does not have the shape of a buffer%'
				FROM sb_stat_buffers WHERE buffer = 'misshapen'},
			"$how, misshapen: counts are kept, and the buffer fails");
		sql('ALTER FOREIGN TABLE misshapen DROP remark');
		wait_for_stored($node, $db, 'misshapen', 107, "$how, misshapen: everything is stored when the column is gone");
		wait_for($node, $db, q{SELECT state = 'running' FROM sb_stat_buffers WHERE buffer = 'misshapen'},
			"$how, misshapen: the buffer works again");
		sql('DROP FOREIGN TABLE misshapen');
	}

	# A column of the key less, with its type.  It comes back when all columns
	# after it are made anew, too.
	sql(q{
		CREATE TYPE mood AS ENUM ('fine', 'bad');
		CREATE TABLE narrowed_calls (key text, counter bigint);
		CREATE FUNCTION narrowed_store(m text, path text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO narrowed_calls VALUES (m || ' ' || path, counter) $$;
		CREATE FUNCTION narrowed_store(m mood, path text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO narrowed_calls VALUES (m || ' ' || path, counter) $$;
		CREATE FUNCTION narrowed_store(path text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO narrowed_calls VALUES (path, counter) $$;
		CREATE FOREIGN TABLE narrowed (m mood NOT NULL, path text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'narrowed_store', interval '1h', timeout '1h', backoff '100ms');
		INSERT INTO narrowed VALUES ('fine', '/', 5), ('bad', '/', 7);
		SELECT sb_start('narrowed')});
	sql('ALTER FOREIGN TABLE narrowed DROP m');
	sql(q{SELECT sb_increment('/', 100, 'narrowed'); SELECT sb_flush_all('narrowed')});
	wait_for_stored($node, $db, 'narrowed', 100, "$how, narrowed: what is counted without the column is stored");
	wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('failing', 12) FROM (%s) AS s}, sprintf($held, 'narrowed')),
		"$how, narrowed: what was counted before is kept, and the buffer fails");
	is(sql(q{
			BEGIN;
			ALTER FOREIGN TABLE narrowed DROP path, DROP count,
				ADD m mood NOT NULL, ADD path text NOT NULL, ADD count bigint NOT NULL;
			SELECT m, path, count FROM narrowed ORDER BY m;
			COMMIT}),
		"fine|/|5\nbad|/|7", "$how, narrowed: with the column made anew it is there again");
	have_it_looked_at('narrowed');
	wait_for_stored($node, $db, 'narrowed', 112, "$how, narrowed: and stored");
	is(sql('SELECT key, counter FROM narrowed_calls ORDER BY key'), "/|100\nbad /|7\nfine /|5",
		"$how, narrowed: as what it was counted");

	# With the type itself gone it cannot; TRUNCATE ends that.
	sql(q{INSERT INTO narrowed VALUES ('fine', '/', 5)});
	sql('DROP TYPE mood CASCADE');
	sql(q{SELECT sb_increment('/', 1000, 'narrowed'); SELECT sb_flush_all('narrowed')});
	wait_for_stored($node, $db, 'narrowed', 1112, "$how, narrowed: what is counted without the type is stored");
	wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('failing', 5) FROM (%s) AS s}, sprintf($held, 'narrowed')),
		"$how, narrowed: what was counted with the type is kept, and the buffer fails");
	sql('TRUNCATE narrowed');
	wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('running', 0) FROM (%s) AS s}, sprintf($held, 'narrowed')),
		"$how, narrowed: TRUNCATE discards it, and the buffer works again");
	is(sql(q{SELECT sb_drain('narrowed')}), 't', "$how, narrowed: drained");
	$offset = -s $node->logfile;
	sql(q{DROP FOREIGN TABLE narrowed; DROP TABLE narrowed_calls; DROP ROUTINE narrowed_store(text, bigint), narrowed_store(text, text, bigint)});

	# Another type of the same look, while the handler is busy with the old one.
	$gate = make_busy('retyped');
	sql(q{
		CREATE FUNCTION retyped_store(key varchar, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO retyped_calls VALUES ('varchar ' || key, counter) $$});
	run_while_busy('ALTER FOREIGN TABLE retyped ALTER key TYPE varchar(20)', $gate);
	sql(q{SELECT sb_increment('k', 8, 'retyped')});
	wait_for_stored($node, $db, 'retyped', 115, "$how, retyped: what was held is converted, and stored with what is counted now");
	is(sql('SELECT key, sum(counter) FROM retyped_calls GROUP BY key ORDER BY key'),
		"k|5\nvarchar k|10\nvarchar other|100", "$how, retyped: what was in flight as what it was counted");
	sql('DROP FOREIGN TABLE retyped');
	return;
}

test_with_servers(\&test_key_columns);

# --- key columns change while nobody is at work -----------------------------

$node = new_handler_node();

# What was counted before is kept but not handed over as something else; what
# is counted then is stored as it should be.
sql(q{
CREATE TABLE stored_names (k text PRIMARY KEY, n bigint);
CREATE FUNCTION shaped_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ SELECT store('shaped', ARRAY[k], ARRAY[n]) $$;
CREATE FUNCTION shaped_handler(k text, n bigint) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO stored_names AS s VALUES (k, n)
	ON CONFLICT (k) DO UPDATE SET n = s.n + EXCLUDED.n
$$;
CREATE FOREIGN TABLE shaped (k text NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'shaped_handler', interval '1h', backoff '100ms');
SELECT sb_increment('no ' || k, 2, 'shaped') FROM generate_series(1, 50) AS k;
ALTER FOREIGN TABLE shaped ALTER COLUMN k TYPE int;
SELECT sb_increment(7, 7, 'shaped');
SELECT sb_async_increment(8, 1, 'shaped');
INSERT INTO shaped VALUES (7, 1), (1, 4);
});
is(sql("SELECT k, n FROM shaped ORDER BY k"),
	"1|4\n7|8\n8|1",
	'after the type of the key has changed keys of the new type are counted');
is(sql("SELECT pending FROM sb_stat_buffers WHERE buffer = 'shaped'"),
	'113',
	'those counted before are still held');
sql("ALTER FOREIGN TABLE shaped OPTIONS (SET interval '10ms')");
wait_for($node, $db,
	"SELECT state = 'failing' AND last_error LIKE '%altered%'
	 FROM sb_stat_buffers WHERE buffer = 'shaped'",
	'the view tells that they cannot be stored');
$node->wait_for_log(
	qr/could not flush \d+ keys? of buffer "shaped": some keys were counted before the key columns were altered\n.*DETAIL:  The first one cannot be converted: invalid input syntax for type integer: "no \d+"\n.*HINT:  Alter the columns back/);
pass('and so does the log, with a hint');
wait_for($node, $db, "SELECT sum(n) FROM stored WHERE buffer = 'shaped'",
	'the others are stored', '13');
is(sql("SELECT sb_drain('shaped', '300ms')"),
	'f', 'a drain does not claim that all was stored');
is(sql('SELECT count(*) FROM stored_names'), '0', 'nothing was stored under a key that it is not');
sql("ALTER FOREIGN TABLE shaped ALTER COLUMN k TYPE text");
is(sql("SELECT sb_drain('shaped', '180s')"),
	't', 'with the type changed back the counts are flushed');
is(sql('SELECT count(*), sum(n), max(n) FROM stored_names'),
	'50|100|2',
	'all of them, once');
is(sum_stored('shaped'), '13', 'and the others not again');

# An increment and then a change of the column in one transaction
like(
	error_of(
		"BEGIN; SELECT sb_increment('1', 1, 'shaped');
		 ALTER FOREIGN TABLE shaped ALTER COLUMN k TYPE int; COMMIT;"),
	qr/ERROR/,
	'what was counted under the old type is not published under the new');
is(sql("SELECT coalesce(sb_count('1', 'shaped'), 0)"),
	'0', 'the transaction was rolled back');
is(sql("SELECT atttypid::regtype FROM pg_attribute WHERE attrelid = 'shaped'::regclass AND attname = 'k'"),
	'text',
	'all of it');
sql("DROP FOREIGN TABLE shaped");

$node->stop('fast');
has_not_crashed($node, 'the server never crashed');

done_testing();
