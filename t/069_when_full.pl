# At a bound of memory: a new key is an error in the call, which a savepoint can
# catch, or its count is discarded with a warning, as the option when_full says.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use WasteTest;

my $db = 'postgres';
my $node = new_node('main', 'max_prepared_transactions = 2');
my $full = qr/ERROR:  out of memory for keys of buffer "stuck"/;
my $bound = q{interval '1h', max_memory '64kB', timeout '1h', backoff '1h'};

# Run statements in one session, whatever fails.  Returns what they return and
# what is told.
sub run
{
	my ($statements, %options) = @_;
	my (undef, $stdout, $stderr) = $node->psql($db, $statements, on_error_stop => 0, %options);

	return ($stdout, $stderr);
}

sub told
{
	return (run(@_))[1];
}

# How many times something is in a text.
sub occurrences
{
	my ($pattern, $text) = @_;
	my @found = $text =~ /$pattern/g;

	return scalar @found;
}

sub stat_of
{
	my ($name, $column) = @_;

	return sql("SELECT $column FROM sb_stat_buffers WHERE relid = '$name'::regclass");
}

# Without loss: what was counted is held, stored or discarded.
sub adds_up
{
	my ($name, $counted, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(stat_of($name, 'pending + in_flight + flushed_count + discarded'), $counted, $what);
	is(sql("SELECT coalesce(sum(count), 0) FROM $name"), stat_of($name, 'pending + in_flight'), 'and what is held is there');
	return;
}

# --- an error in the call ---------------------------------------------------

make_summing_buffer($node, 'stuck', $bound);
sql(q{
	INSERT INTO stuck_bad VALUES ('not now');
	CREATE TABLE orders (key text);
	CREATE TABLE by_row (key text);
	CREATE TABLE by_statement (key text);
	CREATE TRIGGER count AFTER INSERT OR UPDATE OR DELETE ON by_row
		FOR EACH ROW EXECUTE FUNCTION sb_trigger('stuck', 'key');
	CREATE TRIGGER count AFTER INSERT ON by_statement REFERENCING NEW TABLE AS new
		FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('stuck', 'key');
	CREATE FUNCTION try(statement text) RETURNS text LANGUAGE plpgsql AS $$
	BEGIN
		EXECUTE statement;
		RETURN 'done';
	EXCEPTION WHEN out_of_memory THEN
		RETURN SQLERRM;
	END $$});
fill_buffer($node, 'stuck', 'held');
my $held = sql('SELECT count(*) FROM stuck');

# Each way to count a new key, where a savepoint keeps what else the transaction
# does.  Each in a session that has never counted.
my $copy = q{COPY stuck FROM STDIN;
new	1
\.
};
foreach my $statement (
	q{SELECT sb_increment('new', 1, 'stuck');},
	q{SELECT sb_increment('new', -1, 'stuck');},
	q{SELECT sb_increment('new', 1::bigint << 50, 'stuck');},
	q{SELECT sb_async_increment('new', 1, 'stuck');},
	q{INSERT INTO stuck VALUES ('new');},
	q{INSERT INTO stuck VALUES ('held 1'), ('new');},
	$copy,
	q{INSERT INTO by_row VALUES ('new');},
	q{INSERT INTO by_statement VALUES ('held 1'), ('new');})
{
	sql('TRUNCATE orders');
	my $told = told("BEGIN; INSERT INTO orders VALUES ('order'); SAVEPOINT s;\n$statement\nROLLBACK TO s; COMMIT;");
	like($told, $full, 'an error in the call: ' . ($statement =~ s/\n.*//sr));
	is(occurrences('ERROR', $told), 1, 'and in no other statement');
	is(sql('SELECT count(*) FROM orders'), '1', 'the order has its row');
}
is(sql(q{SELECT try($$SELECT sb_increment('new', 1, 'stuck')$$)}), 'out of memory for keys of buffer "stuck"', 'PL/pgSQL catches it');
is(sql('SELECT count(*), sum(count) FROM stuck'), "$held|$held", 'nothing of all that was counted');
is(stat_of('stuck', 'discarded'), '0', 'or discarded');

# What needs no room.
is(told(q{
		BEGIN;
		SELECT sb_increment('held 1', 5, 'stuck'), sb_increment('new', 0, 'stuck');
		INSERT INTO by_row VALUES ('held 2');
		UPDATE by_row SET key = 'held 3';
		COMMIT}), '', 'keys that are held, and counts of 0');
is(sql(q{SELECT sb_count('held 1', 'stuck'), sb_count('held 2', 'stuck'), sb_count('held 3', 'stuck')}), '6|1|2', 'are counted');
like(told(q{UPDATE by_row SET key = 'new'}), $full, 'an update to a new key');

# A loop of calls that fail leaves nothing in the session, and keeps nothing of
# what was counted before.
is(sql(q{
		BEGIN;
		SELECT sb_increment('held 1', 1, 'stuck');
		SELECT count(*) FROM generate_series(1, 1000) g
		WHERE try(format('SELECT sb_increment(%L, 1, %L)', 'new ' || g, 'stuck')) LIKE 'out of memory%';
		COMMIT;
		SELECT sb_count('held 1', 'stuck')}), "1\n1000\n7", 'a thousand calls fail, and the transaction goes on');

# Memory that only runs out between the call and the commit.
sql(q{ALTER FOREIGN TABLE stuck OPTIONS (SET max_memory '80kB')});
my $session = $node->background_psql($db, on_error_stop => 0);
$session->query_safe('BEGIN');
$session->query_safe(q{SELECT sb_increment('meanwhile', 1, 'stuck')});
fill_buffer($node, 'stuck', 'held');
$session->query_safe(q{SELECT sb_increment('meanwhile', 1, 'stuck')});
is($session->{stderr}, '', 'a key that the transaction has is not looked at again');
$session->query(q{SAVEPOINT s; SELECT sb_increment('another', 1, 'stuck')});
like($session->{stderr}, $full, 'another one is refused');
$session->{stderr} = '';
$session->query_safe('ROLLBACK TO s');
$session->query('COMMIT');
like($session->{stderr}, $full, 'what finds no room any more is an error at the commit');
$session->{stderr} = '';

# A bound that is altered is in force with the next call of a session that was
# there before; a key that was rolled back is a new one.
sql(q{ALTER FOREIGN TABLE stuck OPTIONS (SET max_memory '96kB')});
$session->query_safe(q{BEGIN; SAVEPOINT s; SELECT sb_increment('again', 1, 'stuck'); ROLLBACK TO s});
is($session->{stderr}, '', 'a bound that was raised');
fill_buffer($node, 'stuck', 'held');
$session->query(q{SELECT sb_increment('again', 1, 'stuck')});
like($session->{stderr}, $full, 'a key that was rolled back is a new one');
$session->{stderr} = '';
$session->query_safe('ROLLBACK');
sql(q{ALTER FOREIGN TABLE stuck OPTIONS (SET max_memory '112kB')});
$session->query_safe(q{SELECT sb_increment('again', 1, 'stuck')});
sql(q{ALTER FOREIGN TABLE stuck OPTIONS (SET max_memory '64kB')});
$session->query_safe('BEGIN');
$session->query(q{SELECT sb_increment('more', 1, 'stuck')});
like($session->{stderr}, $full, 'a bound that was lowered');
$session->quit;

# --- discarded --------------------------------------------------------------

my $warning = qr/WARNING:  discarding the counts? of (\d+) new keys? of buffer "stuck"\nDETAIL:  All memory that the buffer's option "max_memory" allows is in use\.\nHINT:  You might need to increase the option "max_memory" with ALTER FOREIGN TABLE\./;
my $counted = stat_of('stuck', 'pending + in_flight');

is(stat_of('stuck', 'discarded'), '0', 'so far, nothing is discarded');
my $offset = -s $node->logfile;
sql(q{ALTER FOREIGN TABLE stuck OPTIONS (ADD when_full 'discard')});

# check_discard(STATEMENTS, WARNINGS, NUMBER, SUM, COUNTED): what they tell, how
# many keys are in the last warning, the sum that is discarded, and how much they
# count in keys that are held.
sub check_discard
{
	my ($statements, $warnings, $nkeys, $sum, $kept) = @_;
	my $before = stat_of('stuck', 'discarded');
	my ($out, $told) = run($statements);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$statements =~ s/\n.*//s;
	is(occurrences($warning, $told), $warnings, "warnings: $statements");
	is(($told =~ /$warning/)[0], $nkeys, 'for the number of keys') if $warnings;
	unlike($told, qr/ERROR|FATAL|server closed/, 'and no error');
	$counted += $sum + $kept;
	is(stat_of('stuck', 'discarded') - $before, $sum, 'the sum is in the statistics');
	adds_up('stuck', $counted, 'all of it adds up');
	return $out;
}
check_discard(q{SELECT sb_increment('new', 5, 'stuck')}, 1, 1, 5, 0);
check_discard(q{SELECT sb_increment('new', -5, 'stuck')}, 1, 1, -5, 0);
check_discard(q{SELECT sb_async_increment('new', 5, 'stuck')}, 1, 1, 5, 0);
check_discard(q{INSERT INTO stuck VALUES ('new', 3), ('new', 2), ('newer', 5), ('held 1', 7)}, 1, 2, 10, 7);
check_discard($copy, 1, 1, 1, 0);
check_discard(q{INSERT INTO by_row SELECT 'new ' || g FROM generate_series(1, 10000) g}, 1, 10000, 10000, 0);
check_discard(q{INSERT INTO by_statement SELECT 'new ' || g % 100 FROM generate_series(1, 10000) g}, 1, 100, 10000, 0);
check_discard(q{INSERT INTO stuck SELECT 'new ' || g FROM generate_series(1, 1000000) g}, 1, 1000000, 1000000, 0);
check_discard(q{SELECT count(sb_async_increment('new ' || g, 1, 'stuck')) FROM generate_series(1, 10000) g}, 1, 1, 10000, 0);
check_discard(q{
	DO $$
	BEGIN
		FOR g IN 1 .. 1000 LOOP
			BEGIN
				PERFORM sb_async_increment('new ' || g, 1, 'stuck');
				ASSERT g % 2 = 0;
			EXCEPTION WHEN assert_failure THEN
				NULL;
			END;
		END LOOP;
	END $$}, 1, 1, 1000, 0);

# A transaction that does both is told of both.
check_discard(q{BEGIN; SELECT sb_increment('new', 1, 'stuck'); SELECT sb_async_increment('new', 1, 'stuck'); COMMIT}, 2, 1, 2, 0);

# The log has one line of all that, and the log has no other.
is(lines_in_log($node, 'WARNING: .*discarding the count', $offset), 1, 'one line in the log');

# What has no sum, or is undone, is neither discarded nor told.
check_discard(q{BEGIN; SELECT sb_increment('new', 1, 'stuck'), sb_increment('new', -1, 'stuck'); COMMIT}, 0, 0, 0, 0);
check_discard(q{BEGIN; SELECT sb_increment('new', 1, 'stuck'); ROLLBACK}, 0, 0, 0, 0);
check_discard(q{
	BEGIN;
	SELECT sb_increment('new', 1, 'stuck');
	SAVEPOINT s;
	INSERT INTO stuck SELECT 'new ' || g FROM generate_series(1, 100) g;
	SELECT sb_increment('new', 10, 'stuck');
	ROLLBACK TO s;
	SELECT sb_increment('held 1', 100, 'stuck');
	COMMIT}, 1, 1, 1, 100);

# Until the commit the transaction sees what it has counted, and then nobody.
is(check_discard(q{
		BEGIN;
		SELECT sb_increment('new', 7, 'stuck');
		SELECT sb_count('new', 'stuck'), count FROM stuck WHERE key = 'new';
		COMMIT;
		SELECT sb_count('new', 'stuck') IS NULL}, 1, 1, 7, 0), "7\n7|7\nt", 'what the transaction sees');
is(check_discard(q{
		BEGIN;
		SELECT sb_async_increment('new', 7, 'stuck');
		SELECT sb_count('new', 'stuck') IS NULL;
		COMMIT}, 1, 1, 7, 0), "0\nt", 'what is discarded outside of it, it does not see');

# A flush that is asked for has nothing to flush, which it does not know yet.
like(check_discard(q{SELECT sb_increment('new', 1, 'stuck'), sb_flush('new', 'stuck'), sb_flush_all('stuck')}, 1, 1, 1, 0),
	qr/^1\|t\|\d+$/, 'what a flush returns then');

# Large counts take turns; a key that was refused ends its turn.
check_discard(q{BEGIN; SELECT sb_async_increment('new', 1::bigint << 50, 'stuck')}, 1, 1, 2**50, 0);
is(check_discard(qq{
		BEGIN;
		SELECT sb_async_increment('new', 1::bigint << 50, 'stuck');
		SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()}, 1, 1, 2**50, 0), "0\n0", 'no lock is kept');
check_discard(q{SELECT sb_increment('new', 1::bigint << 50, 'stuck')}, 1, 1, 2**50, 0);

# What cannot be counted for other reasons is an error, and nothing is discarded.
like(told(q{BEGIN; SELECT sb_increment('new', 1, 'stuck'); PREPARE TRANSACTION 'x'}), qr/ERROR:  cannot PREPARE/, 'no PREPARE TRANSACTION');
like(told(q{SELECT sb_increment('held 1', 9223372036854775807, 'stuck')}), qr/ERROR:  count/, 'a count that does not fit');
like(told(q{
		BEGIN;
		SELECT sb_increment('new', 1, 'stuck');
		SELECT sb_increment('held 1', (1::bigint << 61), 'stuck');
		COMMIT}), qr/ERROR:  count is too large/, 'or does not fit at the commit');
adds_up('stuck', $counted, 'leaves nothing');

# A commit that fails after the warning.
$node->safe_psql($db, 'CREATE TABLE skew (id int, n int); INSERT INTO skew VALUES (1, 0), (2, 0)');
my @skewed = map { $node->background_psql($db, on_error_stop => 0) } 1 .. 2;
foreach my $i (0, 1)
{
	$skewed[$i]->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE');
	$skewed[$i]->query_safe('SELECT sum(n) FROM skew');
}
foreach my $i (0, 1)
{
	$skewed[$i]->query_safe('UPDATE skew SET n = 1 WHERE id = ' . ($i + 1));
}
$skewed[1]->query_safe(q{SELECT sb_increment('new', 1, 'stuck')});
$skewed[0]->query_safe('COMMIT');
$skewed[1]->query('COMMIT');
like($skewed[1]->{stderr}, qr/WARNING:  discarding.*ERROR:  could not serialize/s, 'a commit that fails after the warning');
$_->quit foreach @skewed;
adds_up('stuck', $counted, 'discards nothing');

# TRUNCATE in the same transaction, and a buffer that it drops.
sql(q{CREATE FOREIGN TABLE gone (key text, count bigint DEFAULT 1) SERVER statbuffer OPTIONS (max_memory '64kB', when_full 'discard', interval '1h')});
is(sql(q{
		BEGIN;
		INSERT INTO gone SELECT 'key ' || g FROM generate_series(1, 10000) g;
		DROP FOREIGN TABLE gone;
		COMMIT}), '', 'a buffer that the transaction drops');
sql(q{CREATE FOREIGN TABLE truncated (key text, count bigint DEFAULT 1) SERVER statbuffer OPTIONS (max_memory '64kB', when_full 'discard', interval '1h')});
my $told = told(q{
	INSERT INTO truncated SELECT 'key ' || g FROM generate_series(1, 10000) g;
	BEGIN;
	TRUNCATE truncated;
	INSERT INTO truncated SELECT 'new ' || g FROM generate_series(1, 10000) g;
	COMMIT});
my @discarded = $told =~ /WARNING:  discarding the counts of (\d+) new keys of buffer "truncated"/g;
is(scalar @discarded, 2, 'one that it truncates, whose keys still have the room');
is(stat_of('truncated', 'discarded'), $discarded[0] + $discarded[1], 'what is discarded adds up');
is(stat_of('truncated', 'pending'), 10000 - $discarded[1], 'what was truncated does not count');
sql('DROP FOREIGN TABLE truncated');

# --- altered ----------------------------------------------------------------

# ALTER waits for those who have counted, who keep to what they have seen.
$session = $node->background_psql($db, on_error_stop => 0);
$session->query_safe(q{BEGIN; SELECT sb_increment('new', 1, 'stuck')});
my $alter = start_session($node, $db, q{ALTER FOREIGN TABLE stuck OPTIONS (SET when_full 'error')});
wait_for_session($alter, q{l.relation = 'stuck'::regclass}, 'ALTER waits');
$session->query('COMMIT');
like($session->{stderr}, $warning, 'what was counted before is discarded');
$session->{stderr} = '';
$counted++;
finish_session($alter, 'then it is altered');
$session->query(q{SELECT sb_increment('new', 1, 'stuck')});
like($session->{stderr}, $full, 'and the next call is an error');
$session->quit;

# In one transaction: the definition that the transaction leaves decides.
like(told(q{
		BEGIN;
		ALTER FOREIGN TABLE stuck OPTIONS (SET when_full 'discard');
		SELECT sb_increment('new', 1, 'stuck');
		COMMIT}), $warning, 'altered by the transaction itself');
$counted++;
like(told(q{
		BEGIN;
		SELECT sb_increment('new', 1, 'stuck');
		ALTER FOREIGN TABLE stuck OPTIONS (SET when_full 'error');
		COMMIT}), $full, 'the other way round, an error at the commit');
is(sql(q{SELECT 'when_full=discard' = ANY (ftoptions) FROM pg_foreign_table WHERE ftrelid = 'stuck'::regclass}), 't', 'which undoes that, too');
adds_up('stuck', $counted, 'all of it adds up');

# --- early flushes, and the end of it ---------------------------------------

# A key that finds no room has the buffer flushed, and later ones find some.
sql(q{ALTER FOREIGN TABLE stuck OPTIONS (SET backoff '100ms'); TRUNCATE stuck_bad});
sql(q{SELECT sb_flush_all('stuck')});
wait_for($node, $db, q{SELECT pending = 0 AND in_flight = 0 FROM sb_stat_buffers WHERE buffer = 'stuck'}, 'what is held is stored');
wait_for($node, $db, q{SELECT sb_increment('new', 1, 'stuck'); SELECT EXISTS (SELECT FROM stuck WHERE key = 'new')}, 'there is room again', "1\nt");
is(sql("SELECT sb_drain('stuck', '$patience')"), 't', 'it is drained');
is((split /\|/, stored_keys($node, 'stuck'))[1], stat_of('stuck', 'flushed_count'), 'what was stored is what the handler has got');
is(stat_of('stuck', 'pending + in_flight'), '0', 'nothing is held any more');

# --- load -------------------------------------------------------------------

# Sessions count, in and out of transactions, at the bound, while the handler
# fails now and then; they roll back, are cancelled and terminated, and the
# option is altered.  Each row of "done" is an increment that is committed, and
# each value of the sequence one outside of transactions.
make_summing_buffer($node, 'load', q{interval '10ms', max_memory '64kB', timeout '1s', backoff '10ms', when_full 'discard'});
sql(q{CREATE TABLE done (n int)});
# (pgbench would stop when nobody reads its warnings)
local $ENV{PGOPTIONS} = '-c client_min_messages=error';
my @loads = map {
	start_load($node, $_, '-c', 2, '-T', 8)
} (
	q{\set n random(1, 40)
		BEGIN;
		INSERT INTO load SELECT 'key ' || (random() * 100000)::int FROM generate_series(1, :n);
		INSERT INTO done SELECT 1 FROM generate_series(1, :n);
		COMMIT;
	},
	q{\set n random(1, 40)
		BEGIN;
		SAVEPOINT s;
		INSERT INTO load SELECT 'key ' || (random() * 100000)::int FROM generate_series(1, :n);
		ROLLBACK TO s;
		INSERT INTO load SELECT 'other ' || (random() * 100000)::int FROM generate_series(1, :n);
		INSERT INTO done SELECT 1 FROM generate_series(1, :n);
		COMMIT;
	});
my $async = start_load($node, q{SELECT sb_async_increment('async ' || (random() * 100000)::int, 1, 'load');}, '-c', 2, '-T', 8);
delete $ENV{PGOPTIONS};
my $begin = time;
my $struck = 0;
while (time < $begin + 7)
{
	sql(q{INSERT INTO load_bad VALUES ('not now')});
	if ($struck < 3 && time >= $begin + 2 * ($struck + 1))
	{
		my $strike = $struck % 2 ? 'pg_terminate_backend' : 'pg_cancel_backend';

		$struck += sql(qq{
			SELECT count(*) FROM (SELECT pid FROM pg_stat_activity
				WHERE application_name = 'load' AND query !~ 'async' AND state <> 'idle' LIMIT 1) s
			WHERE $strike(pid)});
	}
	sql(q{ALTER FOREIGN TABLE load OPTIONS (SET max_memory '80kB')});
	sql(q{DELETE FROM load_bad});
	sql(q{ALTER FOREIGN TABLE load OPTIONS (SET max_memory '64kB')});
}
$_->{run}->finish foreach @loads, $async;
note $_->{err} foreach @loads;
cmp_ok($struck, '>', 0, 'sessions were cancelled and terminated');
is(sql("SELECT sb_drain('load', '$patience')"), 't', 'the load is drained');
my $calls = ($async->{out} =~ /number of transactions actually processed: (\d+)/)[0];
cmp_ok($calls, '>', 0, 'calls outside of transactions');
my $committed = sql('SELECT count(*) FROM done');
cmp_ok($committed, '>', 0, 'transactions');
cmp_ok(stat_of('load', 'discarded'), '>', 0, 'some of it was discarded');
cmp_ok(stat_of('load', 'flushed_count'), '>', 0, 'some was stored');
is(stat_of('load', 'increments'), $committed + $calls, 'each was counted once');
is(stat_of('load', 'flushed_count + discarded'), $committed + $calls, 'and stored, or discarded');
is((split /\|/, stored_keys($node, 'load'))[1], stat_of('load', 'flushed_count'), 'the handler has got what was stored');

# --- the bound of the server ------------------------------------------------

wait_for($node, $db, q{SELECT keys = 0 FROM sb_stat_buffers WHERE buffer = 'load'}, 'idle keys are freed');
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '4MB'");
$node->reload;
wait_for($node, $db, q{SELECT current_setting('statbuffer.max_memory') = '4MB'}, 'the bound of the server is lowered');
make_summing_buffer($node, 'big', q{interval '1h', timeout '1h', backoff '1h'});
make_summing_buffer($node, 'sales', q{interval '1h', timeout '1h', backoff '1h'});
make_summing_buffer($node, 'views', q{interval '1h', timeout '1h', backoff '1h', when_full 'discard', max_memory '64kB'});
sql(q{INSERT INTO big_bad VALUES ('not now'); INSERT INTO sales VALUES ('held'); INSERT INTO views VALUES ('held')});
fill_buffer($node, 'big', 'held');
$told = told(q{BEGIN; SAVEPOINT s; SELECT sb_increment('not held 1', 1, 'sales'); ROLLBACK TO s; COMMIT});
like($told, qr/ERROR:  out of memory for statbuffer keys\nDETAIL:  All memory that "statbuffer.max_memory" allows is in use\./,
	'an error in the call');
is(occurrences('ERROR', $told), 1, 'and not at the commit');
like(told(q{SELECT sb_increment('not held 1', 1, 'views')}),
	qr/WARNING:  discarding the count of 1 new key of buffer "views"\nDETAIL:  All memory that "statbuffer.max_memory" allows is in use\.\nHINT:  You might need to increase "statbuffer.max_memory"/,
	'or discarded');
like(told(q{BEGIN; SELECT sb_increment('not held 1', 2, 'views'); INSERT INTO big VALUES ('held 1'); COMMIT}),
	qr/WARNING:  discarding the count of 1 new key of buffer "views"/, 'beside another buffer');
like(told(q{BEGIN; SELECT sb_increment('not held 1', 4, 'views'); SELECT sb_increment('not held 1', 1, 'big'); COMMIT}),
	qr/\A[^W]*ERROR:  out of memory for statbuffer keys/, 'each by its own option');
is(stat_of('views', 'discarded'), '3', 'what is discarded adds up');
is(sql(q{SELECT sb_count('held 1', 'big')}), '2', 'and what is counted');

has_not_crashed($node, 'no process crashed');
$node->stop;

# --- the system has less memory than the setting allows ----------------------

$node = new_small_node();
use_node($node);
make_summing_buffer($node, 'stuck', q{interval '1h', timeout '100ms', backoff '100ms'});
sql(q{INSERT INTO stuck_bad VALUES ('not now'); CREATE TABLE orders (key text)});
my $many = q{INSERT INTO stuck SELECT 'new ' || g FROM generate_series(1, 500000) g;};
like(told($many), qr/ERROR:  could not resize shared memory segment .*\nHINT:  Counts are kept in dynamic shared memory/,
	'memory runs out at the commit');
$told = told("BEGIN; INSERT INTO orders VALUES ('order'); SAVEPOINT s; $many ROLLBACK TO s; COMMIT");
like($told, qr/ERROR:  could not resize shared memory segment .*\nHINT:  Counts are kept in dynamic shared memory/,
	'soon after, it is an error in the call');
is(occurrences('ERROR', $told), 1, 'and in no other statement');
is(sql('SELECT count(*) FROM orders'), '1', 'the order has its row');
sql(q{ALTER FOREIGN TABLE stuck OPTIONS (ADD when_full 'discard')});
$told = told("$many SELECT count(*) FROM pg_class; INSERT INTO orders VALUES ('order');");
like($told, qr/\A\S+ WARNING:  discarding the counts of \d+ new keys of buffer "stuck"\nDETAIL:  could not resize shared memory segment .*\nHINT:  Counts are kept in dynamic shared memory, [^\n]*\n?\z/,
	'discarded with what the system has said, and nothing else is told');
adds_up('stuck', 500000, 'all of it adds up');
cmp_ok(stat_of('stuck', 'discarded'), '>', 0, 'some of it was discarded');
cmp_ok(stat_of('stuck', 'pending'), '>', 0, 'some is held');
is(occurrences('WARNING', told(q{SELECT count(sb_async_increment('async ' || g || repeat('x', 1000), 1, 'stuck')) FROM generate_series(1, 100000) g})), 1,
	'outside of transactions');
adds_up('stuck', 600000, 'this adds up, too');
sql('TRUNCATE stuck_bad');
is(sql("SELECT sb_drain('stuck', '$patience')"), 't', 'what is held is drained');
adds_up('stuck', 600000, 'and adds up');
is((split /\|/, stored_keys($node, 'stuck'))[1], stat_of('stuck', 'flushed_count'), 'what was stored is what the handler has got');
has_not_crashed($node, 'no process crashed');
unlike(slurp_file($node->logfile), qr/leak/, 'and none was seen to leak');
$node->stop;

done_testing();
