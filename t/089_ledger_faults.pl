# What holds up the ledger of durable buffers holds up nothing else: a buffer that
# cannot be loaded, or not be locked, others that are in the middle of something, a
# disk that is full.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('node',
	'max_prepared_transactions = 20',
	'autovacuum = off',
	q{statbuffer.ledger_size = '1MB'});
my $ledgers = q{pg_relation_size('sb_ledger_0') + pg_relation_size('sb_ledger_1')};

sql(q{
	CREATE TABLE hits_target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
	CREATE TABLE held_target (LIKE hits_target INCLUDING ALL);
	SELECT sb_create('hits', 'hits_target', 'n', 'durable=true', 'interval=1h');
	SELECT sb_create('held', 'held_target', 'n', 'durable=true', 'interval=1h');
	SELECT sb_create('empty', 'held_target', 'n', 'durable=true', 'interval=1h')});

sub crash
{
	$node->stop('immediate');
	$node->start;
	return;
}

# What a buffer has of a key, stored or not: what is recovered after a crash is due
# at once.
sub total
{
	my ($key, $buffer) = @_;

	return sql("SELECT sb_total('$key', '$buffer')");
}

# A session that keeps others out of a buffer.
sub lock_buffer
{
	my (@statements) = @_;
	my $session = $node->background_psql($db);

	$session->query_safe("BEGIN; $_") foreach @statements;
	return $session;
}

# --- a buffer that cannot be loaded -----------------------------------------------

# Counts in `hits' until the ledger was rotated a few times: until each of its tables
# has got new storage twice.
my $counted = 0;

sub rotate_while_held
{
	my ($what) = @_;
	my $now = q{SELECT pg_relation_filenode('sb_ledger_0') || ' ' || pg_relation_filenode('sb_ledger_1')};
	my $files = sql($now);
	my ($rotations, $largest) = (0, 0);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for (1 .. 300)
	{
		sql(q{
			DO $$
			BEGIN
				FOR i IN 1 .. 400 LOOP
					INSERT INTO hits SELECT 'a key that is long enough to fill the ledger soon ' || k, 1
					FROM generate_series(1, 50) AS k;
					COMMIT;
				END LOOP;
			END
			$$});
		$counted += 400;
		my ($size, $then) = split /\|/, sql("SELECT $ledgers, f FROM ($now) AS s (f)");

		$largest = $size if $size > $largest;
		$rotations++ if $then ne $files;
		$files = $then;
		last if $rotations == 3;
	}
	is($rotations, 3, "$what: the ledger is rotated");
	cmp_ok($largest, '<', 16 * 1024 * 1024, "$what: and remains small");
	is(sql(q{SELECT string_agg(buffer || ' ' || durable, ' ' ORDER BY buffer) FROM sb_stat_buffers}),
		'empty on held pending hits on', "$what: the other one is not loaded");
	return;
}

sub is_exact
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(sql(q{SELECT min(n), max(n) FROM (SELECT sb_total('a key that is long enough to fill the ledger soon ' || k, 'hits') AS n
				FROM generate_series(1, 50) AS k) AS s}), "$counted|$counted", "$what: each key that was counted meanwhile is exact");
	return;
}

sql(q{INSERT INTO held VALUES ('x', 5), ('y', 1), ('y', -1); INSERT INTO hits VALUES ('z', 1)});
crash();

# Who has it locked and looks is told that something is missing, and does not wait;
# who truncates it is not.
my ($status, $out, $err) = $node->psql($db, q{
	BEGIN;
	ALTER FOREIGN TABLE held OPTIONS (SET interval '2h');
	SELECT coalesce(sb_count('x', 'held'), 0);
	ROLLBACK});
is($out, 0, 'who has a buffer locked does not see what is not loaded');
like($err, qr/WARNING:  counts that the ledger of durable buffers has are not loaded yet\n.*while this transaction has the buffer locked/,
	'and is warned');
($status, $out, $err) = $node->psql($db, q{BEGIN; SAVEPOINT s; TRUNCATE held; ROLLBACK TO s; COMMIT});
unlike($err, qr/WARNING/, 'who truncates it is not');
my $locker = lock_buffer(q{ALTER FOREIGN TABLE held OPTIONS (SET interval '2h')});
is(total('z', 'hits'), 1, 'a buffer is loaded while another one is locked');
($status, $out, $err) = $node->psql($db, q{SELECT sb_total('none', 'empty')});
unlike($err, qr/WARNING/, 'nobody waits for one that has nothing');

# The keeper looks once a second whether it can be loaded: each time a few
# transactions.
my $commits = q{SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()};
my $before = sql($commits);
sql('SELECT pg_sleep(3)');
cmp_ok(sql($commits) - $before, '<', 200, 'that keeps nobody busy');

# What the ledger has of it is carried along, and is still to be loaded: when it is
# unlocked, or after another crash, or by who switches it off.
rotate_while_held('locked');
$locker->query_safe('COMMIT');
$locker->quit;
is(total('x', 'held'), 5, 'then it is loaded');
is_exact('then');
sql(q{INSERT INTO held VALUES ('x', 10)});
crash();
$locker = lock_buffer(q{ALTER FOREIGN TABLE held OPTIONS (SET interval '1h')});
rotate_while_held('locked after a crash');
$locker->quit;
crash();
is(total('x', 'held'), 15, 'it is loaded after another crash');
is_exact('after another crash');
crash();
sql(q{INSERT INTO held VALUES ('x', 100)});
$locker = lock_buffer(q{ALTER FOREIGN TABLE held OPTIONS (SET durable 'false')});
rotate_while_held('being switched off');
$locker->query_safe('COMMIT');
$locker->quit;
is(total('x', 'held'), 115, 'it is loaded by who switches it off');
sql(q{ALTER FOREIGN TABLE held OPTIONS (SET durable 'true')});
crash();
is(total('x', 'held'), 115, 'and is durable again');
is_exact('in the end');

# --- prepared transactions that cannot be counted -----------------------------------

# A session that waits for a buffer, and gets it when what was prepared is committed,
# keeps the keeper from counting that.  Nobody else waits for it.
sql(q{BEGIN; INSERT INTO held VALUES ('p', 1); PREPARE TRANSACTION 'stuck'});
my $altering = start_session($node, $db, 'BEGIN; ALTER FOREIGN TABLE held OWNER TO CURRENT_USER',
	q{SELECT pg_advisory_lock_shared(1)}, 'COMMIT');
wait_for_session($altering, q{a.wait_event_type = 'Lock'}, 'ALTER waits for who has prepared');
my $waiting = $node->background_psql($db);
$waiting->query_safe('SELECT pg_advisory_lock(1)');
sql(q{COMMIT PREPARED 'stuck'});
my ($seen, $took) = split /\|/, sql(join(';', 'CREATE TEMP TABLE times AS SELECT clock_timestamp() AS t',
		map({ ('BEGIN', "INSERT INTO hits VALUES ('p', 1)", "PREPARE TRANSACTION 'p'", "COMMIT PREPARED 'p'") } 1 .. 20),
		q{SELECT sb_total('p', 'hits'), extract(epoch FROM clock_timestamp() - t) FROM times}));
is($seen, 20, 'others are counted at once');
cmp_ok($took, '<', 15, 'and do not wait for what cannot be');
$waiting->quit;
finish_session($altering, 'ALTER is done');
wait_for($node, $db, q{SELECT sb_total('p', 'held') = 1}, 'then it is counted');

# --- many buffers --------------------------------------------------------------------

# More than are loaded, or locked, at a time.
my $many = 510;
sql(qq{
	CREATE TABLE many (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
	SELECT count(sb_create('many_' || i, 'many', 'n', 'durable=true', 'interval=1h')) FROM generate_series(1, $many) AS i});
my $all = join ';', map { "INSERT INTO many_$_ VALUES ('key $_', 1)" } 1 .. $many;
my $sum = qq{SELECT sum(sb_total('key ' || i, ('many_' || i)::regclass)) FROM generate_series(1, $many) AS i};
sql("BEGIN; $all; COMMIT");
crash();
is(sql($sum), $many, "$many buffers are loaded");
sql("BEGIN; INSERT INTO many_$many VALUES ('key $many', 1); PREPARE TRANSACTION 'last'");
sql(q{COMMIT PREPARED 'last'});
wait_for($node, $db, "SELECT sb_total('key $many', 'many_$many') = 2", 'what was prepared in the last one is counted');
sql("BEGIN; $all; PREPARE TRANSACTION 'all'");
sql(q{COMMIT PREPARED 'all'});
wait_for($node, $db, "SELECT ($sum) = 2 * $many + 1", 'what was prepared in all of them is counted');

# --- key columns that are altered ------------------------------------------------------

# What is held is converted in the ledger, too, whatever the option is at that moment.
sql(q{
	CREATE TYPE mood AS ENUM ('sad', 'glad');
	CREATE FOREIGN TABLE moods (key mood NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'no_such_function', interval '1h', durable 'true');
	CREATE FOREIGN TABLE others (key mood NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'no_such_function', interval '1h', durable 'true');
	INSERT INTO moods VALUES ('sad', 3), ('glad', 4);
	INSERT INTO others VALUES ('sad', 5), ('glad', 6);
	ALTER FOREIGN TABLE moods ALTER COLUMN key TYPE text;
	BEGIN;
	ALTER FOREIGN TABLE others OPTIONS (SET durable 'false');
	ALTER FOREIGN TABLE others ALTER COLUMN key TYPE text;
	ALTER FOREIGN TABLE others OPTIONS (SET durable 'true');
	COMMIT;
	INSERT INTO moods VALUES ('sad', 10);
	DROP TYPE mood});
my $moods = q{SELECT (SELECT string_agg(key || ' ' || n, ' ' ORDER BY key) FROM moods), (SELECT string_agg(key || ' ' || n, ' ' ORDER BY key) FROM others)};
is(sql($moods), 'glad 4 sad 13|glad 6 sad 5', 'the columns are altered');
crash();
is(sql($moods), 'glad 4 sad 13|glad 6 sad 5', 'the same after a crash');

# What is prepared would not be in memory when it is committed.
like(error_of(q{LOAD 'statbuffer'; BEGIN; ALTER FOREIGN TABLE moods ALTER COLUMN key TYPE name; PREPARE TRANSACTION 'x'}),
	qr/cannot PREPARE a transaction that has altered the key columns of buffer "moods"/, 'it cannot be prepared');

# What is rolled back is as it was.
sql(q{
	BEGIN;
	ALTER FOREIGN TABLE moods OPTIONS (SET durable 'false');
	ALTER FOREIGN TABLE moods ALTER COLUMN key TYPE name;
	ROLLBACK;
	BEGIN;
	SAVEPOINT s;
	ALTER FOREIGN TABLE others ALTER COLUMN key TYPE name;
	ROLLBACK TO s;
	COMMIT});
is(sql($moods), 'glad 4 sad 13|glad 6 sad 5', 'rolled back');
crash();
is(sql($moods), 'glad 4 sad 13|glad 6 sad 5', 'and after another crash');

# A description of the columns that is so long that it is toasted.
sql(q{
	DO $$
	DECLARE
		types text[] := '{int,text,date,bool,oid,numeric,uuid,inet,time,float4,int8,timestamp,timestamptz,interval,bytea,varchar}';
	BEGIN
		FOR t IN 1 .. 2 LOOP
			EXECUTE (SELECT 'CREATE TYPE wide_' || t || ' AS (f0 int, '
					|| string_agg('f' || i || ' ' || types[1 + (hashint4(i + 10000 * t) & 15)], ',' ORDER BY i) || ')'
				FROM generate_series(1, 1500) AS i);
		END LOOP;
	END
	$$;
	CREATE FOREIGN TABLE wides (key wide_1 NOT NULL, k2 wide_2 NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'no_such_function', interval '1h', durable 'true');
	CREATE FUNCTION count_wide(n bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO wides VALUES (json_populate_record(NULL::wide_1, '{"f0": 1}'), json_populate_record(NULL::wide_2, '{"f0": 2}'), n)
	$$;
	SELECT count_wide(7)});
is(sql(q{SELECT pg_relation_size(reltoastrelid) > 0 FROM pg_class WHERE relname = 'sb_ledger_epochs'}), 't', 'a description is toasted');
crash();
is(sql('SELECT sum(n) FROM wides'), 7, 'its buffer is loaded');
sql('TRUNCATE wides; SELECT count_wide(8)');
crash();
is(sql('SELECT sum(n) FROM wides'), 8, 'and truncated');
sql(q{ALTER FOREIGN TABLE wides OPTIONS (SET durable 'false'); ALTER FOREIGN TABLE wides OPTIONS (SET durable 'true')});
crash();
is(sql('SELECT sum(n) FROM wides'), 8, 'and switched off and on');

# --- what drops the ledger ---------------------------------------------------------------

# It locks the buffers first, as whoever counts does.  So it waits for a flush, and the
# flush does not wait for it.
my $offset = -s $node->logfile;
foreach my $drop ('EXTENSION statbuffer CASCADE', 'SCHEMA counting CASCADE', 'OWNED BY counter CASCADE')
{
	$node->safe_psql($db, 'CREATE ROLE counter SUPERUSER') if $drop =~ /OWNED/;
	$node->safe_psql($db, 'CREATE DATABASE dropping');
	$node->safe_psql('dropping', join(';', $drop =~ /OWNED/ ? 'SET ROLE counter' : 'SELECT', 'CREATE SCHEMA counting',
			'CREATE EXTENSION statbuffer SCHEMA counting'));
	make_buffer($node, 'dropping', 'gated', q{interval '10ms', durable 'true'});
	my $gate = close_gate($node, 'dropping');
	$node->safe_psql('dropping', q{INSERT INTO gated VALUES ('a', 1)});
	wait_at_gate($node, 'dropping', 'the handler waits');
	my $dropping = start_session($node, 'dropping', q{LOAD 'statbuffer'}, "DROP $drop");
	wait_for_session($dropping, q{l.relation IS NOT NULL}, "DROP $drop waits for the flush");
	open_gate($gate);
	finish_session($dropping, 'and gets what it wants');
	is($node->safe_psql('dropping', 'SELECT sum(counter) FROM gated_calls'), 1, 'after what was counted is stored');
	$node->safe_psql($db, 'DROP DATABASE dropping');
}
is(lines_in_log($node, qr/deadlock/, $offset), 0, 'nobody was cancelled for it');

# Who may not drop it locks nothing.
$node->safe_psql($db, 'CREATE ROLE stranger LOGIN');
$locker = lock_buffer('SELECT count(*) FROM hits');
($status, $out, $err) = $node->psql($db, "SET lock_timeout = '$patience'; LOAD 'statbuffer'; SET SESSION AUTHORIZATION stranger; DROP EXTENSION statbuffer CASCADE");
like($err, qr/must be owner of extension/, 'who may not drop the extension locks nothing');
$locker->quit;

$node->stop;
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal|could not keep/, 'nothing else went wrong');

# --- no slot, no disk -----------------------------------------------------------------------

$node = PostgreSQL::Test::Cluster->new('full');
$node->init(extra => ['--wal-segsize=1']);
$node->append_conf('postgresql.conf', q{
max_worker_processes = 2
max_logical_replication_workers = 0
max_prepared_transactions = 2
autovacuum = off
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;
use_node($node);
sql(q{
	CREATE EXTENSION statbuffer;
	CREATE TABLE hits_target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
	SELECT sb_create('hits', 'hits_target', 'n', 'durable=true', 'interval=1h')});
make_buffer($node, $db, 'gated', q{interval '10ms'});

# One is the launcher's, and the other one that of a busy worker.
my $gate = close_gate($node, $db);
increment($node, $db, 'gated', 'a');
wait_at_gate($node, $db, 'the last slot is taken');
sql(q{BEGIN; INSERT INTO hits VALUES ('p', 1); PREPARE TRANSACTION 'p'});
sql(q{COMMIT PREPARED 'p'});
$node->wait_for_log(qr/out of background worker slots\n.*The ledger of a database with durable buffers waits/);
is(total('p', 'hits'), 0, 'without a slot, nothing is counted that was prepared');
open_gate($gate);
wait_for($node, $db, q{SELECT sb_total('p', 'hits') = 1}, 'it is when there is one');

# The disk is full for whoever connects from now on: no file may be larger.
my $insert = q{INSERT INTO hits SELECT 'a key that is long enough to fill the ledger soon ' || g, 1 FROM generate_series(1, 5000) AS g};
my $range = q{SELECT min(t), max(t) FROM (
	SELECT sb_total('a key that is long enough to fill the ledger soon ' || g, 'hits') AS t FROM generate_series(1, 5000) AS g) AS s};
my ($postmaster) = split /\n/, slurp_file($node->data_dir . '/postmaster.pid');
SKIP:
{
	skip 'there is no prlimit', 5 if system("prlimit --pid $postmaster --fsize=2097152:unlimited") != 0;

	my $n = 0;
	for (1 .. 100)
	{
		($status, $out, $err) = $node->psql($db, $insert);
		last if $status != 0;
		$n++;
	}
	like($err, qr/could not (extend|write)[^\n]*: File too large/, 'the ledger cannot grow: the transaction fails');
	cmp_ok($n, '>', 1, 'not the first one');
	is(sql($range), "$n|$n", 'and nothing of it is counted');
	system_or_bail("prlimit --pid $postmaster --fsize=unlimited:unlimited");
	sql($insert);
	crash();
	is(sql($range), ($n + 1) . '|' . ($n + 1), 'after a crash, all is there that was counted');
	is(sql(q{SELECT sb_drain('hits')}), 't', 'and is stored');
}
$node->stop;
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing else went wrong');
done_testing();
