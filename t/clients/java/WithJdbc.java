// The JDBC driver: parameters go to the server, with their types.

import java.sql.BatchUpdateException;
import java.sql.CallableStatement;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Types;
import java.util.Arrays;

public class WithJdbc {
	static final String ME = "jdbc";
	static Connection db;

	static void seen(String what, Object value) {
		System.out.println(what + ": " + value);
	}

	static PreparedStatement prepare(String statement, Object... parameters) throws SQLException {
		PreparedStatement prepared = db.prepareStatement(statement);
		for (int i = 0; i < parameters.length; i++)
			prepared.setObject(i + 1, parameters[i]);
		return prepared;
	}

	// A statement that returns nothing: how many rows it says that it has changed.
	static int update(String statement, Object... parameters) throws SQLException {
		try (PreparedStatement prepared = prepare(statement, parameters)) {
			return prepared.executeUpdate();
		}
	}

	static Object value(String statement, Object... parameters) throws SQLException {
		try (PreparedStatement prepared = prepare(statement, parameters);
			 ResultSet result = prepared.executeQuery()) {
			result.next();
			return result.getObject(1);
		}
	}

	// Adds a statement so many times to a batch.  How many rows did each change?
	static String batch(int times, String statement, Object... parameters) throws SQLException {
		try (PreparedStatement prepared = prepare(statement, parameters)) {
			for (int i = 0; i < times; i++)
				prepared.addBatch();
			return Arrays.stream(prepared.executeBatch()).distinct().boxed().toList().toString();
		}
	}

	public static void main(String[] args) throws SQLException {
		String url = System.getenv("JDBC_URL");
		db = DriverManager.getConnection(url);
		seen("version", db.getMetaData().getDriverVersion());

		// One.
		value("SELECT sb_increment(?, buffer => 'hits')", ME + "/one");
		update("INSERT INTO hits VALUES (?)", ME + "/one");

		// A thousand: in batches, in transactions of their own and in one, and in
		// batches that the driver makes one statement of.
		seen("batch", batch(300, "INSERT INTO hits VALUES (?)", ME + "/thousand"));
		db.setAutoCommit(false);
		batch(300, "INSERT INTO hits VALUES (?, ?)", ME + "/thousand", 1L);
		db.commit();
		db.close();
		db = DriverManager.getConnection(url + "&reWriteBatchedInserts=true");
		seen("rewritten", batch(200, "INSERT INTO hits (path) VALUES (?)", ME + "/thousand"));
		db.setAutoCommit(false);
		batch(199, "INSERT INTO hits VALUES (?, ?)", ME + "/thousand", 1L);
		db.commit();
		db.close();

		// A batch is a transaction, though no other was begun: after an error in it,
		// nothing of it is counted.
		db = DriverManager.getConnection(url);
		try (PreparedStatement prepared = db.prepareStatement("INSERT INTO hits VALUES (?, ?)")) {
			for (Long count : new Long[] {1L, null, 1L}) {
				prepared.setString(1, ME + "/error");
				prepared.setObject(2, count, Types.BIGINT);
				prepared.addBatch();
			}
			prepared.executeBatch();
		} catch (BatchUpdateException error) {
			seen("batch error", error.getSQLState());
		}

		// A function's result.  executeUpdate() fails when it is there, which is too
		// late: without a transaction, it is counted.
		try {
			update("SELECT sb_increment(?, 1, 'hits')", ME + "/thousand");
		} catch (SQLException error) {
			seen("executeUpdate", error.getSQLState());
		}
		try (CallableStatement call = db.prepareCall("{? = call sb_increment(?, ?, 'hits')}")) {
			call.registerOutParameter(1, Types.BIGINT);
			call.setString(2, ME + "/called");
			call.setLong(3, 4);
			call.execute();
			seen("called", call.getLong(1));
		}

		// A key of two columns; and the buffer as a parameter.
		update("INSERT INTO visit_counts VALUES (?, ?)", 7, ME);
		value("SELECT sb_increment(?, 1, ?)", "(7," + ME + ")", "visit_counts");
		value("SELECT sb_increment(ROW(?, ?), 0, 'visit_counts')", 7, ME);

		// Rolled back, and not.
		db.setAutoCommit(false);
		value("SELECT sb_increment(?, 100, 'hits')", ME + "/rollback");
		value("SELECT sb_async_increment(?, 1, 'hits')", ME + "/rollback");
		db.rollback();
		update("INSERT INTO hits VALUES (?)", ME + "/savepoint");
		Savepoint savepoint = db.setSavepoint();
		update("INSERT INTO hits VALUES (?, ?)", ME + "/savepoint", 100L);
		db.rollback(savepoint);
		update("INSERT INTO hits VALUES (?)", ME + "/savepoint");
		db.commit();

		seen("total", value("SELECT sb_total(?, 'hits')", ME + "/one"));
		db.commit();

		// Connections that only read: the function may count, INSERT may not.
		db.setReadOnly(true);
		value("SELECT sb_increment(?, buffer => 'hits')", ME + "/readonly");
		db.commit();
		try {
			update("INSERT INTO hits VALUES (?)", ME + "/readonly");
		} catch (SQLException error) {
			seen("readonly", error.getSQLState());
			db.rollback();
		}
		db.setReadOnly(false);
		db.setAutoCommit(true);

		// The view.
		Object article = value("INSERT INTO article (title) VALUES (?) RETURNING id", ME);
		seen("rows", update("UPDATE article SET views = views + 1 WHERE id = ?", article));
		seen("rows of a batch", batch(1, "UPDATE article SET views = views + ? WHERE id = ?", 1L, article));
		try (PreparedStatement prepared = db.prepareStatement("INSERT INTO article (title) VALUES (?)", new String[] {"id"})) {
			prepared.setString(1, ME + " generated");
			prepared.executeUpdate();
			ResultSet keys = prepared.getGeneratedKeys();
			keys.next();
			seen("generated", keys.getInt(1) > (Integer) article);
		}

		// As Hibernate does: with a version column, or with all that was read, the
		// row must be as it was.
		seen("as read", update("UPDATE article SET views = ? WHERE id = ? AND views = ?", 3L, article, 2L));
		seen("stale", update("UPDATE article SET views = ? WHERE id = ? AND views = ?", 3L, article, 2L));
		seen("verb", value("SELECT views FROM article WHERE id = ?", article));

		// It takes no lock, as on a table it would: two that have read the same both
		// count.
		Object both = value("INSERT INTO article (title) VALUES (?) RETURNING id", ME + " both");
		db.setAutoCommit(false);
		int first = update("UPDATE article SET views = ? WHERE id = ? AND views = ?", 1L, both, 0L);
		try (Connection other = DriverManager.getConnection(url);
			 PreparedStatement prepared = other.prepareStatement("UPDATE article SET views = 1 WHERE id = ? AND views = 0")) {
			prepared.setObject(1, both);
			seen("both as read", first + " and " + prepared.executeUpdate());
		}
		db.commit();
		db.setAutoCommit(true);
		seen("both", value("SELECT views FROM article WHERE id = ?", both));

		// A result set that is updatable needs a primary key.
		try (ResultSet result = db.createStatement(ResultSet.TYPE_SCROLL_INSENSITIVE, ResultSet.CONCUR_UPDATABLE)
				.executeQuery("SELECT id, views FROM article WHERE id = " + article)) {
			result.next();
			result.updateLong("views", 4);
			result.updateRow();
			seen("updatable", "yes");
		} catch (SQLException error) {
			seen("updatable", error.getSQLState());
		}
		db.close();
	}
}
