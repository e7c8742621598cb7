# Durable buffers and what else is done to a database: definitions are altered,
# tables are vacuumed, checked and dumped, transaction IDs wrap around, the server
# writes as little WAL as it can, or as much.  After each, a crash: what was
# counted, and is not stored, is there.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';

# Least WAL: new storage is not logged, and there is a lot of it when the ledger
# is rotated.
my $node = new_node('node',
	'wal_level = minimal',
	'max_wal_senders = 0',
	'max_prepared_transactions = 10',
	'restart_after_crash = on',
	q{statbuffer.ledger_size = '1MB'},
	q{shared_preload_libraries = 'statbuffer'});

sub crash
{
	$node->stop('immediate');
	$node->start;
	return;
}

# What is counted is held, until a crash: what is recovered is due at once.
sub make
{
	my ($buffer, @options) = @_;

	sql(join '', map { "$_;" }
		"CREATE TABLE ${buffer}_target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0)",
		"SELECT sb_create('$buffer', '${buffer}_target', 'n', " . join(', ', map { "'$_'" } 'durable=true', 'interval=1h', @options) . ')');
	return;
}

# Everything is stored: of one key, or of all, as "key count".
sub total
{
	my ($buffer, $key) = @_;

	return sql("SELECT sb_drain('$buffer'); SELECT sum(n) FROM ${buffer}_target"
		. (defined $key ? " WHERE key = '$key'" : '')) =~ s/^t\n//r;
}

# --- definitions ---------------------------------------------------------------

make('hits');
sql(q{
	CREATE ROLE keeper;
	GRANT USAGE ON FOREIGN SERVER statbuffer TO keeper;
	GRANT CREATE ON SCHEMA public TO keeper;
	CREATE SCHEMA elsewhere AUTHORIZATION keeper;
	INSERT INTO hits VALUES ('a', 1), ('b', 10);
	ALTER FOREIGN TABLE hits RENAME TO visits;
	INSERT INTO visits VALUES ('a', 2);
	ALTER FOREIGN TABLE visits SET SCHEMA elsewhere;
	INSERT INTO elsewhere.visits VALUES ('a', 4);
	ALTER FOREIGN TABLE elsewhere.visits RENAME COLUMN key TO page;
	ALTER TABLE hits_target RENAME COLUMN key TO page;
	INSERT INTO elsewhere.visits VALUES ('a', 8)});
crash();
is(sql(q{SELECT sb_total('a', 'elsewhere.visits'), sb_total('b', 'elsewhere.visits')}), '15|10', 'another name, schema and column name');
sql(q{
	ALTER TABLE hits_target OWNER TO keeper;
	ALTER FOREIGN TABLE elsewhere.visits OWNER TO keeper;
	INSERT INTO elsewhere.visits VALUES ('a', 16)});
crash();
is(sql(q{SELECT sb_total('a', 'elsewhere.visits'), sb_total('b', 'elsewhere.visits')}), '31|10', 'another owner');
sql(q{REASSIGN OWNED BY keeper TO CURRENT_USER});
crash();
is(sql(q{SELECT sb_total('a', 'elsewhere.visits'), sb_total('b', 'elsewhere.visits')}), '31|10', 'REASSIGN OWNED');
sql(q{
	ALTER FOREIGN TABLE elsewhere.visits SET SCHEMA public;
	ALTER FOREIGN TABLE visits RENAME TO hits;
	ALTER FOREIGN TABLE hits RENAME COLUMN page TO key;
	ALTER TABLE hits_target RENAME COLUMN page TO key;
	INSERT INTO hits VALUES ('a', 2)});
crash();
is(total('hits'), '43', 'and back');
crash();
is(total('hits'), '43', 'stored once');

# A buffer of the same name has nothing of the former one's.
sql(q{INSERT INTO hits VALUES ('a', 5); DROP FOREIGN TABLE hits; DROP TABLE hits_target});
make('hits');
sql(q{INSERT INTO hits VALUES ('a', 6)});
crash();
is(total('hits'), '6', 'a buffer that was dropped and made again');
sql(q{DROP EXTENSION statbuffer CASCADE; DROP TABLE hits_target; CREATE EXTENSION statbuffer});
make('hits');
sql(q{INSERT INTO hits VALUES ('a', 7)});
crash();
is(total('hits'), '7', 'an extension that was dropped and made again');

# --- counting -------------------------------------------------------------------

# In transactions that write nothing, and in a server where that is the default:
# there, counts are kept until workers may write again.
sql(q{BEGIN READ ONLY; SELECT sb_increment('a', 1, 'hits'); COMMIT});
sql(q{ALTER SYSTEM SET default_transaction_read_only = on});
$node->reload;
wait_for($node, $db, q{SELECT current_setting('default_transaction_read_only') = 'on'}, 'transactions are read-only by default');
sql(q{SELECT sb_increment('a', 2, 'hits')});
crash();
wait_for($node, $db, q{SELECT last_error = 'cannot execute UPDATE in a read-only transaction' FROM sb_stat_buffers WHERE buffer = 'hits'},
	'nothing is stored');
crash();
is(sql(q{SELECT sb_total('a', 'hits')}), '10', 'counted in read-only transactions');
sql(q{SET default_transaction_read_only = off; ALTER SYSTEM RESET default_transaction_read_only});
$node->reload;
wait_for($node, $db, q{SELECT current_setting('default_transaction_read_only') = 'off'}, 'transactions may write again');
is(total('hits'), '10', 'and it is stored');

# Outside of the transaction, when the WAL writer has come by.
my $lsn = sql(q{BEGIN; SELECT sb_async_increment('a', 3, 'hits'); SELECT pg_current_wal_insert_lsn(); ROLLBACK}) =~ s/^\d+\n//r;
wait_for($node, $db, "SELECT pg_current_wal_flush_lsn() >= '$lsn'", 'the WAL writer writes what is counted outside of the transaction');
crash();
is(total('hits'), '13', 'sb_async_increment() in a transaction that was rolled back');

# What found no room was not counted, whether that is an error or not.
foreach my $when (qw(error discard))
{
	make("small_$when", 'max_memory=64kB', "when_full=$when");
	my ($status, $out, $err) = $node->psql($db, qq{
		SELECT sb_increment('key ' || i, 1, 'small_$when') FROM generate_series(1, 100) AS i;
		SELECT sb_increment('key ' || i, 1, 'small_$when') FROM generate_series(101, 5000) AS i;
		SELECT sb_increment('key 1', 1, 'small_$when')}, on_error_stop => 0);
	my $before = sql(qq{SELECT sum(sb_total('key ' || i, 'small_$when')) FROM generate_series(1, 5000) AS i});

	like($err, $when eq 'error' ? qr/out of memory for keys of buffer "small_error"/ : qr/discarding the counts of/, "when_full '$when'");
	cmp_ok($before, $when eq 'error' ? '==' : '>', 101, 'some have found room');
	cmp_ok($before, '<', 5001, 'and not all');
	crash();
	is(total("small_$when"), $before, 'and these are there after a crash');
	is(total("small_$when", 'key 1'), '2', 'with their counts');
	sql("DROP FOREIGN TABLE small_$when");
}

# What a failing handler has had discarded does not come back.
sql(q{
	CREATE FUNCTION refuse(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END';
	CREATE FOREIGN TABLE refused (key text, n bigint DEFAULT 1) SERVER statbuffer
		OPTIONS (handler 'refuse', durable 'true', restart 'temporary', interval '0');
	INSERT INTO refused VALUES ('a', 5)});
wait_for($node, $db, q{SELECT discarded > 0 FROM sb_stat_buffers WHERE buffer = 'refused'}, q{restart 'temporary': discarded});
wait_for($node, $db, q{SELECT count(*) = 0 FROM refused}, 'and not held');
sql(q{ALTER FOREIGN TABLE refused OPTIONS (SET interval '1h'); INSERT INTO refused VALUES ('b', 6)});
my $offset = -s $node->logfile;
crash();
$node->wait_for_log(qr/discarded counts of buffer "refused": \d+/, $offset);
is(sql(q{SELECT discarded FROM sb_stat_buffers WHERE buffer = 'refused'}), '6', 'it does not come back after a crash');
sql('DROP FOREIGN TABLE refused');

# A clean stop saves the counts of buffers that are not durable, beside those that are.
make('saved', 'shutdown=0');
sql(q{
	ALTER FOREIGN TABLE saved OPTIONS (SET durable 'false');
	ALTER FOREIGN TABLE hits OPTIONS (ADD shutdown '0');
	INSERT INTO saved VALUES ('a', 100);
	SELECT sb_drain('hits');
	INSERT INTO hits VALUES ('a', 4)});
$node->stop;
ok(-e $node->data_dir . '/statbuffer.saved', 'a stop saves the counts of the one that is not durable');
$node->start;
is(total('saved') . ' ' . total('hits'), '100 17', 'both are there after a restart');
sql(q{INSERT INTO saved VALUES ('lost', 1000)});
crash();
is(total('saved') . ' ' . total('hits'), '100 17', 'and the durable one after a crash');

# --- upkeep ---------------------------------------------------------------------

my $ledgers = q{pg_relation_size('sb_ledger_0') + pg_relation_size('sb_ledger_1')};

sql(q{INSERT INTO hits SELECT 'key ' || i, i FROM generate_series(1, 1000) AS i});
my $sum = total('hits');
my @upkeep = (
	'VACUUM', 'VACUUM FREEZE', 'VACUUM FULL', 'ANALYZE', 'CLUSTER', 'VACUUM FULL sb_ledger_0, sb_ledger_1',
	"REINDEX DATABASE $db", 'CHECKPOINT', 'ALTER MATERIALIZED VIEW sb_ledger_0 SET TABLESPACE pg_default');
push @upkeep, 'REPACK' if major($node) >= 19;
foreach my $statement (@upkeep)
{
	sql($statement);
	sql(q{INSERT INTO hits VALUES ('upkeep', 1)});
	$sum++;
	crash();
	is(total('hits'), $sum, "$statement, and a crash");
}
is(sql(q{
		SELECT count(*) FROM pg_class, txid_current()
		WHERE relname LIKE 'sb\_ledger\_%' AND relkind = 'm' AND age(relfrozenxid) > 1000}), '0', 'VACUUM freezes the ledger');
sql(q{CREATE EXTENSION amcheck});
is(sql(q{
		SELECT relname, h.* FROM pg_class, verify_heapam(pg_class.oid) AS h
		WHERE relname LIKE 'sb\_ledger\_%' AND relkind = 'm'}), '', 'amcheck finds nothing wrong with the ledger');

# It is rotated, with new storage that is not logged, and the server crashes.
my $files = q{SELECT pg_relation_filenode('sb_ledger_0'), pg_relation_filenode('sb_ledger_1')};
my $then = sql($files);
my $rotated = 0;
for (1 .. 60)
{
	sql(q{SELECT count(sb_async_increment('key ' || i, 1, 'hits')) FROM generate_series(1, 1000) AS i});
	$sum += 1000;
	last if $rotated = sql($files) ne $then;
}
ok($rotated, 'the ledger is rotated');
crash();
is(total('hits'), $sum, 'wal_level = minimal: rotated, and a crash');

# --- dumps ----------------------------------------------------------------------

# The ledger is not dumped.  What is restored has what was stored.
sql(q{SELECT sb_drain('hits'); INSERT INTO hits VALUES ('a', 1)});
my $dump = $node->backup_dir . '.sql';
$node->command_ok([ 'pg_dump', '-f', $dump, '-d', $node->connstr($db) ], 'pg_dump');
unlike(slurp_file($dump), qr/sb_ledger/, 'nothing of the ledger is in the dump');
sql('CREATE DATABASE restored TEMPLATE template0');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('restored'), '-f', $dump ], 'restored');
use_node($node, 'restored');
is(total('hits'), $sum, 'nothing is held');
sql(q{INSERT INTO hits VALUES ('a', 3)});
crash();
is(total('hits'), $sum + 3, 'until something is counted, which survives a crash');
use_node($node);
is(total('hits'), ++$sum, 'as does what the other one has');
sql('DROP DATABASE restored');

# --- logical decoding -----------------------------------------------------------

$node->append_conf('postgresql.conf', "wal_level = logical\nmax_wal_senders = 4\nmax_replication_slots = 4");
$node->restart;
sql(q{
	CREATE PUBLICATION everything FOR ALL TABLES;
	SELECT pg_create_logical_replication_slot('changes', 'test_decoding')});
sql(q{
	INSERT INTO hits VALUES ('decoded', 1);
	SELECT sb_async_increment('decoded', 1, 'hits');
	SELECT sb_drain('hits')});
$sum += 2;
is(sql(q{
		SELECT count(*) FILTER (WHERE data LIKE '%sb_ledger%'), count(*) FILTER (WHERE data LIKE '%hits_target%decoded%2%')
		FROM pg_logical_slot_get_changes('changes', NULL, NULL)}), '0|1', 'logical decoding sees what is stored, and nothing of the ledger');
is(sql(q{SELECT count(*) FROM pg_publication_tables WHERE tablename LIKE 'sb\_%'}), '0', 'and no publication has it');
sql(q{SELECT pg_drop_replication_slot('changes'); DROP PUBLICATION everything});
is(sql(q{SELECT sum(n) FROM hits_target}), $sum, 'everything is stored once');

# --- wraparound -----------------------------------------------------------------

# Twice a good half of all transaction IDs pass, which VACUUM is to survive.
sql(q{
	INSERT INTO hits VALUES ('old', 5);
	UPDATE pg_database SET datallowconn = true});
for my $round (1, 2)
{
	sql(q{INSERT INTO hits VALUES ('old', 1)});
	$node->command_ok([ 'vacuumdb', '--all', '--freeze', '-q' ], 'all is frozen');
	my $next = sql(q{SELECT pg_current_xact_id()});

	$node->stop;
	$next = ($next + 1_400_000_000) % 2**32;
	$next = 1_048_576 if $next < 1_048_576;
	$next -= $next % 1_048_576;
	$node->command_ok([ 'pg_resetwal', '-x', $next, '-D', $node->data_dir ], 'transaction IDs pass');

	# the commit log of that time, and nobody has committed
	my $segment = $node->data_dir . '/pg_xact/' . sprintf('%04X', $next / 1_048_576);
	open my $log, '>:raw', $segment or die "$segment: $!";
	print $log "\0" x (256 * 1024);
	close $log;
	$node->start;
	is(total('hits', 'old'), 5 + $round, "what was counted before they passed, round $round");
	crash();
	is(total('hits', 'old'), 5 + $round, 'and a crash');
}
sql(q{UPDATE pg_database SET datallowconn = false WHERE datname = 'template0'; SELECT sb_drain('hits')});
is(sql(q{SELECT n FROM hits_target WHERE key = 'old'}), '7', 'stored once');
$node->stop;
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|could not keep|invalid row/, 'nothing of it is wrong in the log');

done_testing();
